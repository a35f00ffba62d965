// The first product of a chain, M = V D W, for a tile of samples: V the last linear stage, W the one before, D the 0-1
// diagonal of a sample's active units. Samples whose patterns resemble one another share the terms that they have in
// common: along a tree, M is that of another sample, plus the units that came in, minus those that went out. On trained
// networks that is a fifth of the terms, on random ones half.
//
// Error. Subtracting what was added before leaves its rounding behind. With t_ij = max_k |V_ki| |W_ij|, every partial
// sum of column j on the way from the root of the tree is at most T_j = sum_i t_ij, so that N terms on the way leave at
// most N u T_j (u: unit roundoff). Summed afresh it would be at most n u f_j, f_j the sum of t_ij over the sample's own
// active units: f is carried along as one row more, and a sample with f_j < T_j / kCancellation in any column is summed
// afresh, as are NaN and overflow. N <= kMostSteps n. So the error bound is at most kCancellation kMostSteps times that
// of the plain sum; typically the two differ by little.
#ifndef LIPFAST_CHAIN_PATTERNS_INL_H
#define LIPFAST_CHAIN_PATTERNS_INL_H

#include "panel_product-inl.h"

constexpr int64_t kCancellation = 8, kMostSteps = 4;

LIPFAST_INLINE int32_t hamming_distance(const uint64_t* a, const uint64_t* b, int64_t words) {
  int64_t apart = 0;
  for (int64_t w = 0; w < words; ++w) apart += __builtin_popcountll(a[w] ^ b[w]);
  return static_cast<int32_t>(apart);
}

// Orders the samples so that each comes after the one that it starts from (from[t]; -1: from nothing), and the sum of
// the terms is small: a minimum spanning tree (Prim, 1957) of the patterns and the empty one, in Hamming distance.
// steps, distance: one value per sample each, scratch. kWords: of a pattern; 0: `any_words`.
template <int kWords>
void span_patterns(const uint64_t* patterns, int64_t any_words, int64_t samples, int64_t most_steps, int32_t* order,
                   int32_t* from, int32_t* steps, int32_t* distance) {
  const int64_t words = kWords > 0 ? kWords : any_words;
  int64_t nearest = 0;  // position in order[k ..], the samples that are not in the tree yet
  for (int64_t t = 0; t < samples; ++t) {
    int64_t active = 0;
    for (int64_t w = 0; w < words; ++w) active += __builtin_popcountll(patterns[t * words + w]);
    distance[t] = static_cast<int32_t>(active);
    from[t] = -1;
    order[t] = static_cast<int32_t>(t);
    nearest = distance[t] < distance[nearest] ? t : nearest;
  }
  for (int64_t k = 0; k < samples; ++k) {
    const int32_t t = order[nearest];
    order[nearest] = order[k];
    order[k] = t;
    steps[t] = distance[t] + (from[t] < 0 ? 0 : steps[from[t]]);
    const uint64_t* own = patterns + t * words;
    int32_t least = INT32_MAX;
    for (int64_t i = k + 1; i < samples; ++i) {
      const int32_t other = order[i], apart = hamming_distance(own, patterns + other * words, words);
      int32_t now = distance[other];
      if (apart < now && steps[t] + apart <= most_steps) {
        distance[other] = now = apart;
        from[other] = t;
      }
      nearest = now < least ? i : nearest;
      least = now < least ? now : least;
    }
  }
}

// The units in which two patterns differ (b == nullptr: the empty one): first those of a alone, then those of b alone.
struct Changes {
  int32_t added, all;
};
inline Changes list_changes(const uint64_t* a, const uint64_t* b, int64_t words, int32_t* units) {
  Changes changes{};
  const auto append = [&](int64_t word, uint64_t bits) {
    for (; bits != 0; bits &= bits - 1) units[changes.all++] = static_cast<int32_t>(word * 64 + __builtin_ctzll(bits));
  };
  for (int64_t w = 0; w < words; ++w) append(w, a[w] & ~(b == nullptr ? 0 : b[w]));
  changes.added = changes.all;
  for (int64_t w = 0; w < words && b != nullptr; ++w) append(w, b[w] & ~a[w]);
  return changes;
}

// What the tiles of a network share: per unit its column of V and the largest magnitude there (outputs + 1 values),
// then T_j / kCancellation of the columns; NaN where T is not finite, which no comparison passes.
template <class T>
LIPFAST_INLINE int64_t pattern_table_size(int64_t units, int64_t outputs) {
  return round_up(units * (outputs + 1), Simd<T>::kLanes);
}
template <class T>
LIPFAST_INLINE int64_t patterns_size(int64_t units, int64_t outputs, int64_t columns) {
  return pattern_table_size<T>(units, outputs) + round_up(columns, Simd<T>::kLanes);
}
template <class T>
LIPFAST_INLINE typename Simd<T>::Vector absolute_value(typename Simd<T>::Vector v) {
  typedef int32_t Bits __attribute__((vector_size(LIPFAST_VECTOR_BYTES)));
  if constexpr (sizeof(T) == sizeof(double)) {
    return absolute(v);
  } else {
    return reinterpret_cast<typename Simd<T>::Vector>(reinterpret_cast<Bits>(v) & INT32_MAX);
  }
}
template <class T>
void pack_patterns(const T* v, int64_t units, int64_t outputs, const T* w, int64_t columns, T* packed) {
  const int64_t step = outputs + 1;
  T* limits = packed + pattern_table_size<T>(units, outputs);
  for (int64_t i = 0; i < units; ++i) {
    T largest = 0;
    for (int64_t k = 0; k < outputs; ++k) {
      const T value = v[k * units + i], magnitude = value < 0 ? -value : value;
      packed[i * step + k] = value;
      if (largest == largest && !(largest >= magnitude)) largest = magnitude;  // NaN stays
    }
    packed[i * step + outputs] = largest;
  }
  for (int64_t j = 0; j < columns; j += kColumns<T>) {
    const int64_t width = panel_width<T>(columns - j);
    const T* panel = panel_at<T>(w, units, j);
    for (int64_t c = 0; c < width; c += Simd<T>::kLanes) {
      typename Simd<T>::Vector total{};
      for (int64_t i = 0; i < units; ++i) {
        total += absolute_value<T>(load(panel + i * width + c)) * splat(packed[i * step + outputs]);
      }
      // x - x is 0 where x is finite, else NaN.
      store(limits + j + c, total * splat(T(1) / kCancellation) + (total - total));
    }
  }
}

#endif

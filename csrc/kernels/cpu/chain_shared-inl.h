// The product of chain_patterns-inl.h for the samples of a tile.
#ifndef LIPFAST_CHAIN_SHARED_INL_H
#define LIPFAST_CHAIN_SHARED_INL_H

#include "chain_layers-inl.h"
#include "chain_linear-inl.h"
#include "chain_patterns-inl.h"
#include "panel_product-inl.h"

// Bit i of a pattern: unit i has a derivative other than zero.
template <class T>
void read_pattern(const T* factors, int64_t units, uint64_t* pattern) {
  for (int64_t word = 0; word * 64 < units; ++word) {
    const int64_t first = word * 64, count = smaller<int64_t>(64, units - first);
    uint64_t bits = 0;
#if LIPFAST_VECTOR_BYTES == 64
    for (int64_t i = 0; i < count; i += kIndices) {
      const uint32_t valid = count - i < kIndices ? (1u << (count - i)) - 1 : 0xffff;
      bits |= static_cast<uint64_t>(lanes_active(factors + first + i, valid)) << i;
    }
#else
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>(factors[first + i] != 0) << i;
#endif
    pattern[word] = bits;
  }
}

// sum += or -= V's columns times rows of W's panel, over a list of units: kRows rows of V, of which the last may be
// that of the magnitudes, which takes |W|.
template <class T, int kRows, int kVectors, bool kMagnitudes, bool kSubtract>
LIPFAST_INLINE void change_rows(const T* v, int64_t v_step, const int32_t* units, int64_t count, const T* panel,
                                typename Simd<T>::Vector (&sum)[kRows][kVectors]) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t a = 0; a < count; ++a) {
    const T* left = v + units[a] * v_step;
    const T* right = panel + static_cast<int64_t>(units[a]) * (kVectors * kLanes);
    Vector w[kVectors];
    LIPFAST_UNROLL
    for (int c = 0; c < kVectors; ++c) w[c] = load(right + c * kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector factor = splat(left[r]);
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        const Vector with = kMagnitudes && r == kRows - 1 ? absolute_value<T>(w[c]) : w[c];
        sum[r][c] = kSubtract ? sum[r][c] - factor * with : sum[r][c] + factor * with;
      }
    }
  }
}

// Where the rows of M and the row of its magnitudes lie; `rows` == nullptr: zeros.
template <class T>
struct SharedRows {
  T *rows, *magnitudes;
  int64_t step;
  LIPFAST_INLINE T* row(int64_t r, bool of_magnitudes) const { return of_magnitudes ? magnitudes : rows + r * step; }
  LIPFAST_INLINE SharedRows below(int64_t r) const {
    return {rows == nullptr ? nullptr : rows + r * step, magnitudes, step};
  }
};

template <class T, int kRows, int kVectors, bool kMagnitudes>
void change_panel(const T* v, int64_t v_step, const int32_t* units, Changes changes, const T* panel,
                  const SharedRows<T>& from, const SharedRows<T>& to) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  Vector sum[kRows][kVectors] = {};
  if (from.rows != nullptr) {
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) sum[r][c] = load(from.row(r, kMagnitudes && r == kRows - 1) + c * kLanes);
    }
  }
  change_rows<T, kRows, kVectors, kMagnitudes, false>(v, v_step, units, changes.added, panel, sum);
  change_rows<T, kRows, kVectors, kMagnitudes, true>(v, v_step, units + changes.added, changes.all - changes.added,
                                                     panel, sum);
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LIPFAST_UNROLL
    for (int c = 0; c < kVectors; ++c) store(to.row(r, kMagnitudes && r == kRows - 1) + c * kLanes, sum[r][c]);
  }
}

// The rows of M and of its magnitudes, in tiles of equal height, for the columns of one panel.
template <class T, int kVectors>
void change_all_rows(int64_t rows, const T* v, const int32_t* units, Changes changes, const T* panel,
                     const SharedRows<T>& from, const SharedRows<T>& to) {
  for_tiles<kRowTile>(rows, [&]<int kRows>(int64_t r) {
    if (r + kRows == rows) {
      change_panel<T, kRows, kVectors, true>(v + r, rows, units, changes, panel, from.below(r), to.below(r));
    } else {
      change_panel<T, kRows, kVectors, false>(v + r, rows, units, changes, panel, from.below(r), to.below(r));
    }
  });
}

// Whether all magnitudes reach their limits, over whole vectors.
template <class T>
bool reaches(const T* magnitudes, const T* limits, int64_t columns) {
  typedef typename Simd<T>::Vector Vector;
  const Vector zero{}, one = splat(T(1));
  Vector short_of{};
  for (int64_t j = 0; j < columns; j += Simd<T>::kLanes) {
    short_of += load(magnitudes + j) >= load(limits + j) ? zero : one;
  }
  return horizontal_sum<T>(short_of) == 0;
}

// What the next sample starts from: it has left the nearest cache since.
template <class T, int kVectors>
LIPFAST_INLINE void prefetch_rows(const SharedRows<T>& rows, int64_t count) {
  for (int64_t r = 0; r <= count; ++r) {
    const T* row = rows.row(r, r == count);
    LIPFAST_UNROLL
    for (int c = 0; c < kVectors; ++c) __builtin_prefetch(row + c * Simd<T>::kLanes);
  }
}

template <class T, int kVectors>
void product_panel(const T* shared, const T* panel, int64_t j, int64_t samples, T* out, ChainBuffers<T>& buffers) {
  const int64_t stride = buffers.stride, size = buffers.outputs * stride;
  const auto rows_of = [&](int64_t t) {
    return SharedRows<T>{out + t * size + j, buffers.magnitudes + t * stride + j, stride};
  };
  for (int64_t k = 0; k < samples; ++k) {
    const int64_t t = buffers.order[k], from = buffers.from[t];
    const SharedRows<T> to = rows_of(t);
    const int64_t next = k + 1 < samples ? buffers.from[buffers.order[k + 1]] : -1;
    if (next >= 0 && next != t) prefetch_rows<T, kVectors>(rows_of(next), buffers.outputs);
    change_all_rows<T, kVectors>(buffers.outputs + 1, shared, buffers.active + t * buffers.most_units,
                                 buffers.changes[t], panel, from < 0 ? SharedRows<T>{} : rows_of(from), to);
  }
}

// out: the rows of V D W, W of `layer`, of all samples; those that are not marked as exact are to be summed afresh.
template <class T>
void product_shared(const ChainLayer& layer, const T* packed, const T* shared, int64_t samples, T* out,
                    ChainBuffers<T>& buffers) {
  const int64_t units = layer.map->out.channels, columns = layer.columns, words = (units + 63) / 64;
  for (int64_t t = 0; t < samples; ++t) {
    read_pattern(Selection<T>(layer, t, buffers).factors, units, buffers.patterns + t * words);
  }
  const auto span = words == 4 ? span_patterns<4> : span_patterns<0>;
  span(buffers.patterns, words, samples, kMostSteps * units, buffers.order, buffers.from, buffers.steps,
       buffers.distance);
  for (int64_t t = 0; t < samples; ++t) {
    const int64_t from = buffers.from[t];
    buffers.changes[t] =
        list_changes(buffers.patterns + t * words, from < 0 ? nullptr : buffers.patterns + from * words, words,
                     buffers.active + t * buffers.most_units);
  }
  for (int64_t j = 0; j < columns; j += kColumns<T>) {
    const T* panel = panel_at<T>(packed, units, j);
    if (panel_width<T>(columns - j) == kColumns<T>) {
      product_panel<T, 2>(shared, panel, j, samples, out, buffers);
    } else {
      product_panel<T, 1>(shared, panel, j, samples, out, buffers);
    }
  }
  const T* limits = shared + pattern_table_size<T>(units, buffers.outputs);
  for (int64_t t = 0; t < samples; ++t) {
    buffers.exact[t] = buffers.from[t] < 0 || reaches(buffers.magnitudes + t * buffers.stride, limits, columns);
  }
}

#endif

// Vector types of LIPFAST_VECTOR_BYTES and the few operations on them that every body needs: it comes with each of
// them.
#ifndef LIPFAST_VECTOR_INL_H
#define LIPFAST_VECTOR_INL_H

typedef float FloatVector __attribute__((vector_size(LIPFAST_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(LIPFAST_VECTOR_BYTES)));
// The same, loadable from any address.
typedef float FloatVectorUnaligned __attribute__((vector_size(LIPFAST_VECTOR_BYTES), aligned(4), may_alias));
typedef double DoubleVectorUnaligned __attribute__((vector_size(LIPFAST_VECTOR_BYTES), aligned(8), may_alias));
typedef int32_t IndexVectorUnaligned __attribute__((vector_size(LIPFAST_VECTOR_BYTES), aligned(4), may_alias));
constexpr int kIndices = LIPFAST_VECTOR_BYTES / 4;
// As many floats as a DoubleVector has doubles.
typedef float HalfVectorUnaligned __attribute__((vector_size(LIPFAST_VECTOR_BYTES / 2), aligned(4), may_alias));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef FloatVector Vector;
  typedef FloatVectorUnaligned Unaligned;
  static constexpr int kLanes = LIPFAST_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  typedef DoubleVector Vector;
  typedef DoubleVectorUnaligned Unaligned;
  static constexpr int kLanes = LIPFAST_VECTOR_BYTES / 8;
};
constexpr int kDoubles = LIPFAST_VECTOR_BYTES / 8;

template <class T>
LIPFAST_INLINE typename Simd<T>::Vector load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}
template <class T>
LIPFAST_INLINE void store(T* p, typename Simd<T>::Vector v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
// kDoubles values of T, converted.
LIPFAST_INLINE DoubleVector load_double(const double* p) { return load(p); }
LIPFAST_INLINE DoubleVector load_double(const float* p) {
#if LIPFAST_VECTOR_BYTES == 64  // GCC 12 would convert the halves one by one and join them
  return reinterpret_cast<DoubleVector>(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVectorUnaligned*>(p), DoubleVector);
#endif
}
template <class T>
LIPFAST_INLINE typename Simd<T>::Vector splat(T value) {
  return value - typename Simd<T>::Vector{};
}
LIPFAST_INLINE double square_root(double v) { return sqrt(v); }
LIPFAST_INLINE DoubleVector square_root(DoubleVector v) {
  for (int i = 0; i < kDoubles; ++i) v[i] = sqrt(v[i]);
  return v;
}
LIPFAST_INLINE double absolute(double v) { return fabs(v); }
typedef int64_t IntegerVector __attribute__((vector_size(LIPFAST_VECTOR_BYTES)));
LIPFAST_INLINE DoubleVector absolute(DoubleVector v) {
  const IntegerVector bits = reinterpret_cast<IntegerVector>(v) & INT64_MAX;
  return reinterpret_cast<DoubleVector>(bits);
}

// Tiles of kRows x kVectors vectors in registers, and rows in memory that are `stride` apart.
template <class T, int kRows, int kVectors>
LIPFAST_INLINE void load_tile(const T* from, int64_t stride, typename Simd<T>::Vector (&tile)[kRows][kVectors]) {
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) tile[r][v] = load(from + r * stride + v * Simd<T>::kLanes);
  }
}
template <class T, int kRows, int kVectors>
LIPFAST_INLINE void store_tile(T* to, int64_t stride, const typename Simd<T>::Vector (&tile)[kRows][kVectors]) {
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) store(to + r * stride + v * Simd<T>::kLanes, tile[r][v]);
  }
}

// A number in [1, kMost] as a constant: body.operator()<count>().
template <int kMost, class Body>
LIPFAST_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 0) {
    if (count == kMost) return body.template operator()<kMost>();
    with_constant<kMost - 1>(count, body);
  }
}
// Rows in tiles of equal height, at most kMost: body.operator()<height>(first row).
template <int kMost, class Body>
LIPFAST_INLINE void for_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t tile = 0, r = 0; tile < tiles; ++tile) {
    const int64_t height = (rows - r + tiles - tile - 1) / (tiles - tile);
    with_constant<kMost>(height, [&]<int kRows>() { body.template operator()<kRows>(r); });
    r += height;
  }
}

// Halves are added until 16 bytes are left: a chain of additions as long as the vector would cost more than a short
// row.
template <class T, int kBytes>
struct HorizontalSum {
  typedef T Whole __attribute__((vector_size(kBytes)));
  typedef T Half __attribute__((vector_size(kBytes / 2)));
  LIPFAST_INLINE static T of(const Whole& v) {
    Half low, high;
    memcpy(&low, &v, sizeof(Half));
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
    return HorizontalSum<T, kBytes / 2>::of(low + high);
  }
};
template <class T>
struct HorizontalSum<T, 16> {
  typedef T Whole __attribute__((vector_size(16)));
  LIPFAST_INLINE static T of(const Whole& v) {
    return sizeof(T) == 8 ? v[0] + v[1] : (v[0] + v[1]) + (v[2 % (16 / sizeof(T))] + v[3 % (16 / sizeof(T))]);
  }
};
template <class T>
LIPFAST_INLINE T horizontal_sum(typename Simd<T>::Vector v) {
  return HorizontalSum<T, LIPFAST_VECTOR_BYTES>::of(v);
}

// How the lanes of two vectors are rearranged: kLane numbers those of one.
template <class Lanes>
struct Rearranged;
template <int... kLane>
struct Rearranged<std::integer_sequence<int, kLane...>> {
  static constexpr int kCount = sizeof...(kLane);
  // [a_0 + a_1, a_2 + a_3, ..., b_0 + b_1, ...]
  template <class V>
  LIPFAST_INLINE static V pair_sums(V a, V b) {
    return __builtin_shufflevector(a, b, 2 * kLane...) + __builtin_shufflevector(a, b, (2 * kLane + 1)...);
  }
  // [a_0, b_0, a_1, b_1, ...] of the halves that begin at kFirst.
  template <int kFirst, class V>
  LIPFAST_INLINE static V interleaved(V a, V b) {
    return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kCount)...);
  }
};
template <class T>
using LanesOf = Rearranged<std::make_integer_sequence<int, Simd<T>::kLanes>>;

// The horizontal sums of as many vectors as each has lanes, as one vector; `of` is overwritten.
template <class T>
LIPFAST_INLINE typename Simd<T>::Vector lane_sums(typename Simd<T>::Vector* of) {
  constexpr int kLanes = Simd<T>::kLanes;
  LIPFAST_UNROLL
  for (int count = kLanes; count > 1; count /= 2) {
    LIPFAST_UNROLL
    for (int k = 0; k < count / 2; ++k) {
      of[k] = LanesOf<T>::pair_sums(of[2 * k], of[2 * k + 1]);
    }
  }
  return of[0];
}

// The transpose of as many vectors as each has lanes, in place: row i and row i + n/2 are interleaved, log2(n) times.
template <class T>
LIPFAST_INLINE void transpose(typename Simd<T>::Vector* of) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  LIPFAST_UNROLL
  for (int done = 1; done < kLanes; done *= 2) {
    Vector next[kLanes];
    LIPFAST_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = LanesOf<T>::template interleaved<0>(of[i], of[i + kLanes / 2]);
      next[2 * i + 1] = LanesOf<T>::template interleaved<kLanes / 2>(of[i], of[i + kLanes / 2]);
    }
    LIPFAST_UNROLL
    for (int i = 0; i < kLanes; ++i) of[i] = next[i];
  }
}

template <class T>
LIPFAST_INLINE void exchange(T& a, T& b) {
  const T before = a;
  a = b;
  b = before;
}

inline double dot(const double* a, const double* b, int64_t n) {
  DoubleVector s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kDoubles <= n; i += 4 * kDoubles) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + kDoubles) * load(b + i + kDoubles);
    s2 += load(a + i + 2 * kDoubles) * load(b + i + 2 * kDoubles);
    s3 += load(a + i + 3 * kDoubles) * load(b + i + 3 * kDoubles);
  }
  for (; i + kDoubles <= n; i += kDoubles) s0 += load(a + i) * load(b + i);
  double sum = horizontal_sum<double>((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// y += alpha x
inline void axpy(double alpha, const double* x, double* y, int64_t n) {
  const DoubleVector factor = splat(alpha);
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) store(y + i, load(y + i) + factor * load(x + i));
  for (; i < n; ++i) y[i] += alpha * x[i];
}

inline void scale(double alpha, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= alpha;
}

// body(item) for every item in [0, count), on the given threads.
template <class Body>
void for_items(const Parallel* parallel, int64_t count, const Body& body) {
  if (parallel == nullptr) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  parallel->run(
      count, [](void* argument, int64_t item) { (*static_cast<const Body*>(argument))(item); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

#endif

// Elementary functions of vectors of floats or doubles, to a few roundings. NaN gives NaN; no lane depends on another.
#ifndef LIPFAST_ELEMENTARY_INL_H
#define LIPFAST_ELEMENTARY_INL_H

#include "vector-inl.h"

template <class T>
using VectorOf = typename Simd<T>::Vector;

// coefficients[0] + coefficients[1] x + ..., by Horner's scheme.
template <class T, int kCount, int kFirst = 0>
LIPFAST_INLINE VectorOf<T> polynomial(const T (&coefficients)[kCount], VectorOf<T> x) {
  if constexpr (kFirst == kCount - 1) {
    return splat(coefficients[kFirst]);
  } else {
    return polynomial<T, kCount, kFirst + 1>(coefficients, x) * x + coefficients[kFirst];
  }
}

template <class T>
struct Constants;
template <>
struct Constants<float> {
  typedef uint32_t Bits __attribute__((vector_size(LIPFAST_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912;              // 1.5 * 2^23: the sum is an integer, in the lowest bits
  static constexpr float kLowest = -104, kHighest = 89;  // e^x is 0 from there on, or infinite
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  // (e^r - 1) / r to 7e-9 for |r| <= log(2) / 2: Taylor.
  static constexpr float kExponential[] = {1, 1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
  // artanh(s) / s to 3e-9 for s^2 <= 1/9, in powers of s^2: Taylor.
  static constexpr float kArtanh[] = {1, 1.f / 3, 1.f / 5, 1.f / 7, 1.f / 9, 1.f / 11, 1.f / 13, 1.f / 15};
  // (1 + 2 x) e^(x^2) erfc(x) to 2e-9 for x >= 0, in powers of (x - 3.75) / (x + 3.75): see scaled_error_complement().
  static constexpr float kErrorComplement[] = {1.23751263f,      -0.1402405995f,  0.003585495314f,  0.08227677399f,
                                               -0.1088052275f,   0.09230393754f,  -0.05868544049f,  0.02836410512f,
                                               -0.009770087183f, 0.001751157629f, 0.0003301674563f, -0.0002843130758f,
                                               2.204671891e-5f,  1.852194739e-5f};
};
template <>
struct Constants<double> {
  typedef uint64_t Bits __attribute__((vector_size(LIPFAST_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744;  // 1.5 * 2^52
  static constexpr double kLowest = -746, kHighest = 710;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  // To 5e-18, 2e-18 and 2e-17.
  static constexpr double kExponential[] = {
      1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,       1. / 5040,
      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  static constexpr double kArtanh[] = {1,       1. / 3,  1. / 5,  1. / 7,  1. / 9,  1. / 11, 1. / 13, 1. / 15, 1. / 17,
                                       1. / 19, 1. / 21, 1. / 23, 1. / 25, 1. / 27, 1. / 29, 1. / 31, 1. / 33, 1. / 35};
  static constexpr double kErrorComplement[] = {
      1.2375126308378276,     -0.14024059858554696,   0.0035854154854644294,  0.082276738490145208,
      -0.10880393014174886,   0.092304321160377478,   -0.058693398589636774,  0.028362277418956404,
      -0.0097465795580292755, 0.0017556258528952954,  0.00029371366559134482, -0.00029015408054084171,
      5.1649098892682403e-5,  2.238423915508223e-5,   -1.1444146237700523e-5, -9.7355989673677493e-7,
      1.7516376488490621e-6,  -5.7218230603224088e-8, -2.5866850716155885e-7, 2.3263508708859124e-8,
      3.8675334242222357e-8,  -3.7442100809620186e-9, -5.1739902140113096e-9, 3.1114333809799252e-10,
      4.2514714447963898e-10};
};

// e^x = 2^n (1 + rest). 2^n is a product of two factors, so that results near either end of the range come out right.
template <class T>
struct Exponential {
  typedef VectorOf<T> Vector;
  Vector first, second, rest;

  explicit LIPFAST_INLINE Exponential(Vector x) {
    typedef Constants<T> C;
    typedef typename C::Bits Bits;
    x = x < C::kLowest ? splat(C::kLowest) : x;
    x = x > C::kHighest ? splat(C::kHighest) : x;
    const Vector rounded = x * T(1.44269504088896340736) + C::kRound, n = rounded - C::kRound;
    const Vector r = (x - n * C::kLn2High) - n * C::kLn2Low;
    rest = r * polynomial(C::kExponential, r);
    // n with the bias twice: not negative, as few instruction sets shift signed 64-bit integers.
    const Bits exponent = reinterpret_cast<Bits>(rounded) - reinterpret_cast<Bits>(splat(C::kRound)) + 2 * C::kBias;
    const Bits half = exponent >> 1;
    first = reinterpret_cast<Vector>(half << C::kMantissa);
    second = reinterpret_cast<Vector>((exponent - half) << C::kMantissa);
  }
  LIPFAST_INLINE Vector value() const { return (first + first * rest) * second; }
  // e^x - 1 without cancellation, for x <= 0.
  LIPFAST_INLINE Vector minus_1() const {
    const Vector scale = first * second;
    return scale * rest + (scale - 1);
  }
};

template <class T>
LIPFAST_INLINE VectorOf<T> minus_magnitude(VectorOf<T> x) {
  return x > 0 ? -x : x;
}

// log(1 + u) for u in [0, 1], as 2 artanh(u / (2 + u)).
template <class T>
LIPFAST_INLINE VectorOf<T> logarithm_of_1_plus(VectorOf<T> u) {
  const VectorOf<T> s = u / (2 + u);
  return 2 * s * polynomial(Constants<T>::kArtanh, s * s);
}

// The logistic function s(x), and s(-x) = s'(x) / s(x), both without cancellation.
template <class T>
struct Logistic {
  VectorOf<T> value, complement;
  explicit LIPFAST_INLINE Logistic(VectorOf<T> x) {
    const VectorOf<T> e = Exponential<T>(minus_magnitude<T>(x)).value(), large = 1 / (1 + e), small = e * large;
    value = x < 0 ? small : large;
    complement = x < 0 ? large : small;
  }
};

// erfc(x) e^(x^2) for x >= 0, by the Chebyshev expansion of Shepherd and Laframboise (1981).
template <class T>
LIPFAST_INLINE VectorOf<T> scaled_error_complement(VectorOf<T> x) {
  const VectorOf<T> y = (x - T(3.75)) / (x + T(3.75));
  return polynomial(Constants<T>::kErrorComplement, y) / (1 + 2 * x);
}

#endif

// Rounding in float64: the factors and terms with which the kernels' bounds stay true. docs/bounds.md proves the
// bounds; here stands why each factor is large enough. They hold in any order of summation, with or without fused
// multiply-adds: a rounding is a factor in [1 - u, 1 + u].
#pragma once

#include <cmath>

#include "params.h"

namespace lipfast {

constexpr double kUnitRoundoff = 0x1p-53;  // u
// More than all underflows of a bound together, where the largest entry lies in [1/2, 1): 2^100 of them would reach it.
constexpr double kTiny = 0x1p-900;

// For x >= 0, computed with at most roundings - 2 roundings: not below the exact x. With the product's own they are
// k = roundings - 1, and (1 - u)^k (1 + (k + 1) u) >= (1 - k u) (1 + (k + 1) u) >= 1 for k (k + 1) u <= 1. `roundings`
// is even: 1 + roundings u is a float64.
constexpr LIPFAST_SHARED double widening(int roundings) { return 1 + roundings * kUnitRoundoff; }
constexpr LIPFAST_SHARED double widened(double x, int roundings) { return x * widening(roundings); }
// Not above the exact x, with at most k - 1 roundings behind it, k = roundings: (1 + u)^k (1 - k u) <= 1.
constexpr LIPFAST_SHARED double narrowed(double x, int roundings) { return x * (1 - roundings * kUnitRoundoff); }

// An error term, itself computed with a relative error of at most gamma_k, k < 2^30, and so below 2^-22: not below the
// exact one, the product's own rounding included.
constexpr LIPFAST_SHARED double widened(double error) { return error * (1 + 0x1p-20); }

// gamma_k = k u / (1 - k u), widened: k roundings change a value by at most that much of it (Higham 2002, lemma 3.1).
constexpr LIPFAST_SHARED double gamma(int64_t k) {
  const double ku = static_cast<double>(k) * kUnitRoundoff;
  return widened(ku / (1 - ku));
}

// Where A + E = L L^* and |E| <= epsilon |L| |L|^*: ||E||_2 is at most this times the trace of A.
constexpr LIPFAST_SHARED double cholesky_error(double epsilon) { return epsilon / (1 - epsilon); }

// numerator / ||x|| from below, for a numerator with one rounding and a norm computed of size_terms - 2 numbers; 0
// where nothing is proved. The factor 1 - 8 u covers five roundings: the numerator's, 1 + gamma, product, quotient,
// last product.
LIPFAST_SHARED double quotient_below(double numerator, double size, int64_t size_terms) {
  if (!(numerator > 0) || !(size > 0)) return 0;
  return narrowed(numerator / (size * (1 + gamma(size_terms))), 8);
}

// The next float64 up, and for positive values down. These, and what uses them, are not for CUDA.
LIPFAST_INLINE double up(double v) { return nextafter(v, INFINITY); }
LIPFAST_INLINE double down(double v) { return v > 0 ? nextafter(v, 0.0) : v; }

// gamma_k and hardly more: k u is exact, so that two roundings lie behind the quotient.
LIPFAST_INLINE double tight_gamma(int64_t k) {
  const double ku = static_cast<double>(k) * kUnitRoundoff;
  return up(widened(ku / (1 - ku), 4));
}

// 2^e value, rounded in the direction of the bound where the result is denormal.
LIPFAST_INLINE double unscale_up(double value, int exponent) {
  const double scaled = ldexp(value, exponent);
  return scaled < 0x1p-1021 && value > 0 ? up(scaled) : scaled;
}
LIPFAST_INLINE double unscale_down(double value, int exponent) {
  const double scaled = ldexp(value, exponent);
  if (scaled == INFINITY) return 0x1.fffffffffffffp1023;
  return scaled < 0x1p-1021 ? down(scaled) : scaled;
}

}  // namespace lipfast

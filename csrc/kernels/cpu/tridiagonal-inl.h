// Largest eigenvalue of symmetric tridiagonal matrices, one matrix per lane of V (double or DoubleVector).
#ifndef LIPFAST_TRIDIAGONAL_INL_H
#define LIPFAST_TRIDIAGONAL_INL_H

#include "vector-inl.h"

LIPFAST_INLINE bool any_above(double a, double b) { return a > b; }
LIPFAST_INLINE bool any_above(DoubleVector a, DoubleVector b) {
  for (int i = 0; i < kDoubles; ++i) {
    if (a[i] > b[i]) return true;
  }
  return false;
}

// diagonal: n values, off: n - 1 values. Laguerre's iteration from Gershgorin's bound: it descends monotonically to
// the largest root and converges cubically when that is simple (Parlett 1964). With d_i the pivots of T - x I and
// r_i = d_i'/d_i, q_i = d_i''/d_i, the sums of r_i and of r_i^2 - q_i are those of 1/(x - lambda) and its square.
template <class V>
V largest_eigenvalue(const V* diagonal, const V* off, int64_t n) {
  const V zero{};
  V x = diagonal[0] + (n > 1 ? absolute(off[0]) : zero);
  for (int64_t i = 1; i < n; ++i) {
    const V bound = diagonal[i] + absolute(off[i - 1]) + (i + 1 < n ? absolute(off[i]) : zero);
    x = bound > x ? bound : x;
  }
  const V scale = absolute(x);
  x += scale * 4e-16;
  const double count = static_cast<double>(n);
  for (int iteration = 0; iteration < 60; ++iteration) {
    V inverse = 1.0 / (diagonal[0] - x), r = -inverse, q = zero, sum = r, squares = r * r;
    for (int64_t i = 1; i < n; ++i) {
      const V c = off[i - 1] * off[i - 1] * inverse;
      inverse = 1.0 / (diagonal[i] - x - c);
      q = c * (q - 2.0 * r * r) * inverse;
      r = (c * r - 1.0) * inverse;
      sum += r;
      squares += r * r - q;
    }
    V discriminant = (count - 1) * (count * squares - sum * sum);
    discriminant = discriminant > 0 ? discriminant : zero;
    V step = count / (sum + square_root(discriminant));
    // Right of the largest root the sum is positive; negative or NaN, rounding has carried x to the root or past it.
    // A lane that has arrived stays put, whatever its neighbours do.
    step = sum > 0 ? step : zero;
    step = step > 2e-16 * scale ? step : zero;
    x -= step;
    if (!any_above(step, zero)) break;
  }
  return scale > 0 ? x : scale + zero * x;
}

// Number of eigenvalues above x (Sturm).
inline int eigenvalues_above(const double* diagonal, const double* off, int64_t n, double x) {
  int above = 0;
  double d = diagonal[0] - x;
  above += d > 0;
  for (int64_t i = 1; i < n; ++i) {
    if (d == 0) d = 1e-300;
    d = diagonal[i] - x - off[i - 1] * off[i - 1] / d;
    above += d > 0;
  }
  return above;
}

// Second largest eigenvalue to a thousandth of the largest or so: enough for an estimate of the gap.
inline double second_eigenvalue(const double* diagonal, const double* off, int64_t n, double largest) {
  double low = 0, high = largest;
  for (int i = 0; i < 14; ++i) {
    const double middle = 0.5 * (low + high);
    (eigenvalues_above(diagonal, off, n, middle) >= 2 ? low : high) = middle;
  }
  return high;
}

// y: unit eigenvector of the largest eigenvalue, by inverse iteration just above it, where T - x I is negative
// definite and its factorisation needs no pivoting. The start (ones) is not orthogonal to it: for positive
// off-diagonals that vector is positive. work: 2 n values.
inline void top_eigenvector(const double* diagonal, const double* off, int64_t n, double largest, double* y,
                            double* work) {
  const double x = largest * (1 + 1e-15), floor = -larger(1e-16 * fabs(largest), 1e-300);
  double *d = work, *l = work + n;
  for (int64_t i = 0; i < n; ++i) {
    y[i] = 1;
    d[i] = diagonal[i] - x - (i > 0 ? l[i - 1] * off[i - 1] : 0);
    if (!(d[i] < floor)) d[i] = floor;
    if (i + 1 < n) l[i] = off[i] / d[i];
  }
  for (int iteration = 0; iteration < 4; ++iteration) {
    for (int64_t i = 1; i < n; ++i) y[i] -= l[i - 1] * y[i - 1];
    y[n - 1] /= d[n - 1];
    for (int64_t i = n - 2; i >= 0; --i) y[i] = y[i] / d[i] - l[i] * y[i + 1];
    double largest_entry = 0;
    for (int64_t i = 0; i < n; ++i) largest_entry = larger(largest_entry, fabs(y[i]));
    double norm = 0;
    for (int64_t i = 0; i < n; ++i) {
      y[i] /= largest_entry;
      norm += y[i] * y[i];
    }
    scale(1 / sqrt(norm), y, n);
  }
}

#endif

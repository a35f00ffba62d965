// Largest eigenvalue of small symmetric matrices, kDoubles of them at once, one per lane.
#ifndef LIPFAST_SYMMETRIC_TOP_INL_H
#define LIPFAST_SYMMETRIC_TOP_INL_H

#include "tridiagonal-inl.h"

// a: n x n, row-major, both triangles; destroyed. work: 4 n vectors. Householder's reduction to tridiagonal form
// (Golub and Van Loan 2013, section 8.3), then Laguerre's iteration. NaN in a lane stays in that lane.
inline DoubleVector symmetric_top(DoubleVector* a, int64_t n, DoubleVector* work) {
  DoubleVector *diagonal = work, *off = work + n, *v = work + 2 * n, *w = work + 3 * n;
  const DoubleVector zero{};
  for (int64_t k = 0; k + 2 < n; ++k) {
    diagonal[k] = a[k * n + k];
    DoubleVector squares = zero;
    for (int64_t i = k + 1; i < n; ++i) {
      v[i] = a[k * n + i];
      squares += v[i] * v[i];
    }
    const DoubleVector norm = square_root(squares);
    const DoubleVector alpha = v[k + 1] > 0 ? -norm : norm;
    const DoubleVector half = squares - alpha * v[k + 1];  // |v|^2 / 2 of the reflector
    const DoubleVector beta = half > 0 ? 1.0 / half : half;
    off[k] = alpha;
    v[k + 1] -= alpha;
    DoubleVector product = zero;
    for (int64_t i = k + 1; i < n; ++i) {
      DoubleVector sum = zero;
      for (int64_t j = k + 1; j < n; ++j) sum += a[i * n + j] * v[j];
      w[i] = beta * sum;
      product += w[i] * v[i];
    }
    product *= 0.5 * beta;
    for (int64_t i = k + 1; i < n; ++i) w[i] -= product * v[i];
    for (int64_t i = k + 1; i < n; ++i) {
      for (int64_t j = k + 1; j < n; ++j) a[i * n + j] -= v[i] * w[j] + w[i] * v[j];
    }
  }
  if (n > 1) {
    diagonal[n - 2] = a[(n - 2) * n + n - 2];
    off[n - 2] = a[(n - 2) * n + n - 1];
  }
  diagonal[n - 1] = a[n * n - 1];
  return largest_eigenvalue(diagonal, off, n);
}

#endif

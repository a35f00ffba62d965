// One step of the Lanczos process by one block: orthogonalisation, and the top of the tridiagonal matrix.
#pragma once

#include "../random.h"
#include "spectral_norms.h"
#include "tridiagonal.cuh"

namespace lipfast::cuda {

// What a step keeps in shared memory.
struct LanczosShared {
  double scratch[kMaxWarps];
  double diagonal[kMaxBasis], off[kMaxBasis], ritz[kMaxBasis];
  double coefficients[kMaxBasis], multipliers[kMaxBasis];
};

// Value number i of the stream that the CPU takes one by one.
__device__ inline double random_value(uint64_t seed, int64_t i) {
  uint64_t state = seed + static_cast<uint64_t>(i) * kRandomStep;
  return lipfast::random_value(state);
}

__device__ inline double norm(const double* x, int64_t n, double* scratch) {
  double squares = 0;
  for (int64_t j = thread(); j < n; j += threads()) squares += x[j] * x[j];
  return sqrt(block_sum(squares, scratch));
}

// w orthogonal to `count` basis vectors; the second time only where the first took much away (Kahan and Parlett: twice
// is enough). Returns the norm that is left. Each thread reads and writes its own entries of w last.
__device__ inline double orthogonalize(const double* basis, int count, double* w, int64_t n, LanczosShared& shared) {
  double before = norm(w, n, shared.scratch);
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = warp(); i < count; i += warps()) {
      double product = 0;
      for (int64_t j = lane(); j < n; j += kWarp) product += basis[i * n + j] * w[j];
      product = warp_sum(product);
      if (lane() == 0) shared.coefficients[i] = product;
    }
    __syncthreads();
    double squares = 0;
    for (int64_t j = thread(); j < n; j += threads()) {
      double value = w[j];
      for (int i = 0; i < count; ++i) value -= shared.coefficients[i] * basis[i * n + j];
      w[j] = value;
      squares += value * value;
    }
    const double after = sqrt(block_sum(squares, shared.scratch));
    if (after > 0.7 * before) return after;
    before = after;
  }
  return before;
}

// ritz: unit eigenvector of the largest eigenvalue of the tridiagonal matrix, by inverse iteration just above it, where
// T - x I is negative definite and its factorisation needs no pivoting. A chain of dependent operations: one thread.
__device__ inline void top_eigenvector(LanczosShared& shared, int n, double largest) {
  const double x = largest * (1 + 1e-15), floor = -1e-16 * fabs(largest);
  double *y = shared.ritz, *inverse = shared.coefficients, *l = shared.multipliers;
  for (int i = 0; i < n; ++i) {
    y[i] = 1;
    double pivot = shared.diagonal[i] - x - (i > 0 ? l[i - 1] * shared.off[i - 1] : 0);
    if (!(pivot < floor)) pivot = floor;
    inverse[i] = 1 / pivot;
    l[i] = i + 1 < n ? shared.off[i] * inverse[i] : 0;
  }
  for (int iteration = 0; iteration < 4; ++iteration) {
    for (int i = 1; i < n; ++i) y[i] -= l[i - 1] * y[i - 1];
    y[n - 1] *= inverse[n - 1];
    for (int i = n - 2; i >= 0; --i) y[i] = y[i] * inverse[i] - l[i] * y[i + 1];
    double top = 0, squares = 0;
    for (int i = 0; i < n; ++i) top = larger(top, fabs(y[i]));
    for (int i = 0; i < n; ++i) {
      y[i] /= top;
      squares += y[i] * y[i];
    }
    const double scale = 1 / sqrt(squares);
    for (int i = 0; i < n; ++i) y[i] *= scale;
  }
}

// Ritz value of the tridiagonal matrix in shared.diagonal and shared.off (`size` rows), its vector in shared.ritz, and
// an estimate of what the value misses: min(residual, residual^2 / gap). `next`: the norm that the last step left.
__device__ inline double ritz_value(LanczosShared& shared, int size, double next, double* error) {
  const double value = largest_eigenvalue(shared.diagonal, shared.off, size, 4e-16);
  if (thread() == 0 && value > 0) top_eigenvector(shared, size, value);
  for (int64_t i = thread(); i < size && !(value > 0); i += threads()) shared.ritz[i] = i == 0;
  __syncthreads();
  *error = 0;
  if (!(value > 0)) return value;
  const double residual = next * fabs(shared.ritz[size - 1]);
  *error = residual;
  if (size > 1) {
    const double gap = value - eigenvalue(shared.diagonal, shared.off, size, 2, 0, value, 1e-3);
    *error = smaller(residual, residual * residual / larger(gap, 1e-300));
  }
  return value;
}

}  // namespace lipfast::cuda

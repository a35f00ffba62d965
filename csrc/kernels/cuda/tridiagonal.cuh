// Largest eigenvalue of one symmetric matrix by one block: Householder's reduction to tridiagonal form (Golub and Van
// Loan 2013, section 8.3), then multisection with Sturm counts, one shift per thread (Lo, Philippe and Sameh 1987).
#pragma once

#include "device.cuh"

namespace lipfast::cuda {

// Number of eigenvalues above x of the tridiagonal matrix with `diagonal` (n) and `off` (n - 1).
__device__ inline int eigenvalues_above(const double* diagonal, const double* off, int n, double x) {
  int above = 0;
  double pivot = diagonal[0] - x;
  above += pivot > 0;
  for (int i = 1; i < n; ++i) {
    if (pivot == 0) pivot = 1e-300;
    pivot = diagonal[i] - x - off[i - 1] * off[i - 1] / pivot;
    above += pivot > 0;
  }
  return above;
}

// The eigenvalue number `index` from the top (1: the largest), in [low, high], to within `accuracy` of its size. Every
// round, each thread of the block counts at a shift of its own. The same in every thread; NaN gives NaN.
__device__ inline double eigenvalue(const double* diagonal, const double* off, int n, int index, double low,
                                    double high, double accuracy) {
  for (int round = 0; round < 64 && high - low > accuracy * larger(fabs(low), fabs(high)); ++round) {
    const double step = (high - low) / static_cast<double>(threads() + 1);
    const double x = low + step * static_cast<double>(thread() + 1);
    const int below = __syncthreads_count(eigenvalues_above(diagonal, off, n, x) >= index);
    const double next = below < threads() ? low + step * (below + 1) : high;
    low += step * below;
    high = next;
  }
  return 0.5 * (low + high);
}

// By the circles of Gershgorin, a little wider; every thread computes the same.
__device__ inline double gershgorin_bound(const double* diagonal, const double* off, int n) {
  double top = diagonal[0];
  for (int i = 0; i < n; ++i) {
    const double radius = (i > 0 ? fabs(off[i - 1]) : 0) + (i + 1 < n ? fabs(off[i]) : 0);
    top = larger(top, diagonal[i] + radius);
  }
  return top + 4e-16 * fabs(top);
}

// Largest eigenvalue of a positive semidefinite tridiagonal matrix.
__device__ inline double largest_eigenvalue(const double* diagonal, const double* off, int n, double accuracy) {
  double low = diagonal[0];
  for (int i = 1; i < n; ++i) low = larger(low, diagonal[i]);
  return eigenvalue(diagonal, off, n, 1, low - 4e-16 * fabs(low), gershgorin_bound(diagonal, off, n), accuracy);
}

// a: n x n of row stride ld, both triangles, shared or global memory; destroyed. diagonal, off, v, w: n doubles each.
// scratch: kMaxWarps doubles. Ends with a barrier.
__device__ inline void tridiagonalize(double* a, int n, int64_t ld, double* diagonal, double* off, double* v, double* w,
                                      double* scratch) {
  for (int k = 0; k + 2 < n; ++k) {
    const double* row = a + k * ld;
    double squares = 0;
    for (int64_t i = k + 1 + thread(); i < n; i += threads()) squares += row[i] * row[i];
    squares = block_sum(squares, scratch);
    const double norm = sqrt(squares), head = row[k + 1], alpha = head > 0 ? -norm : norm;
    const double half = squares - alpha * head;  // |v|^2 / 2 of the reflector
    const double beta = half > 0 ? 1 / half : half;
    for (int64_t i = k + 1 + thread(); i < n; i += threads()) v[i] = i == k + 1 ? head - alpha : row[i];
    if (thread() == 0) {
      diagonal[k] = row[k];
      off[k] = alpha;
    }
    __syncthreads();
    for (int i = k + 1 + warp(); i < n; i += warps()) {
      double sum = 0;
      for (int j = k + 1 + lane(); j < n; j += kWarp) sum += a[i * ld + j] * v[j];
      sum = warp_sum(sum);
      if (lane() == 0) w[i] = beta * sum;
    }
    __syncthreads();
    double product = 0;
    for (int64_t i = k + 1 + thread(); i < n; i += threads()) product += w[i] * v[i];
    product = 0.5 * beta * block_sum(product, scratch);
    for (int64_t i = k + 1 + thread(); i < n; i += threads()) w[i] -= product * v[i];
    __syncthreads();
    for (int i = k + 1 + warp(); i < n; i += warps()) {
      for (int j = k + 1 + lane(); j < n; j += kWarp) a[i * ld + j] -= v[i] * w[j] + w[i] * v[j];
    }
    __syncthreads();
  }
  if (thread() == 0) {
    if (n > 1) {
      diagonal[n - 2] = a[(n - 2) * ld + n - 2];
      off[n - 2] = a[(n - 2) * ld + n - 1];
    }
    diagonal[n - 1] = a[(n - 1) * ld + n - 1];
  }
  __syncthreads();
}

}  // namespace lipfast::cuda

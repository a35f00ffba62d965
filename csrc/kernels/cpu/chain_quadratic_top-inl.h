// The largest eigenvalue of the last matrix M of the sweep, smoothed: (tr M^q)^(1/q), q = 2 k + 1, with the factor Q of
// its derivative M^(2k) / tr M^q = Q Q^T. A choice of the search; nothing is proved here.
#ifndef LIPFAST_CHAIN_QUADRATIC_TOP_INL_H
#define LIPFAST_CHAIN_QUADRATIC_TOP_INL_H

#include "vector-inl.h"

constexpr int64_t kDenseOutputs = 64;  // up to as many outputs M is squared as it is
constexpr int64_t kRitzVectors = 16;   // else on the span of so many vectors
constexpr int64_t kMostPower = 128;

struct Smoothed {
  double value;  // log of the smoothed eigenvalue
  double top;    // estimate of the largest one, from below
};

// c = a b, n x n
inline void small_product(const double* a, const double* b, int64_t n, double* c) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * n + j] = 0;
    for (int64_t l = 0; l < n; ++l) axpy(a[i * n + l], b + l * n, c + i * n, n);
  }
}

// m: n x n, symmetric; q: n x n or nullptr; room: 3 n x n. Zero for M = 0, NaN where the trace is
// negative or not finite.
inline Smoothed smoothed_top(const double* m, int64_t n, int64_t k, double* q, double* room) {
  double *unit = room, *power = room + n * n, *next = room + 2 * n * n;
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += m[i * n + i];
  if (trace == 0) {
    for (int64_t i = 0; q != nullptr && i < n * n; ++i) q[i] = 0;
    return {-INFINITY, 0};
  }
  if (!(trace > 0) || !(trace < INFINITY)) return {NAN, NAN};
  for (int64_t i = 0; i < n * n; ++i) power[i] = unit[i] = m[i] / trace;
  Smoothed found{};
  double scale = 0;  // power = exp(scale) unit^c
  for (int64_t c = 1;; c *= 2) {
    small_product(power, unit, n, next);
    const double odd = dot(power, next, n * n);  // tr of the (2 c + 1)-th power
    if (c == k) {
      found.value = (log(odd) - 2 * scale) / static_cast<double>(2 * k + 1) + log(trace);
      const double factor = 1 / sqrt(odd * trace);
      for (int64_t i = 0; q != nullptr && i < n * n; ++i) q[i] = factor * power[i];
    }
    if (c == kMostPower) {
      found.top = trace * odd / dot(power, power, n * n);
      return found;
    }
    small_product(power, power, n, next);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += next[i * n + i];
    for (int64_t i = 0; i < n * n; ++i) power[i] = next[i] / sum;
    scale = 2 * scale - log(sum);
  }
}

// z: kRitzVectors vectors of n, nearly orthonormal on return (Gram and Schmidt, twice), nearer to the span of the top.
inline void ritz_step(const double* m, int64_t n, double* z, double* products, const Parallel* parallel) {
  for_items(parallel, kRitzVectors, [&](int64_t v) {
    for (int64_t i = 0; i < n; ++i) products[v * n + i] = dot(m + i * n, z + v * n, n);
  });
  for (int64_t v = 0; v < kRitzVectors; ++v) {
    double* own = z + v * n;
    memcpy(own, products + v * n, sizeof(double) * static_cast<size_t>(n));
    for (int twice = 0; twice < 2; ++twice) {
      for (int64_t p = 0; p < v; ++p) axpy(-dot(own, z + p * n, n), z + p * n, own, n);
      const double norm = sqrt(dot(own, own, n));
      scale(norm > 0 ? 1 / norm : 0, own, n);
    }
  }
}

// Of many outputs: on the span of z, which is moved. q: n rows of kRitzVectors.
inline Smoothed smoothed_top_of_many(const double* m, int64_t n, int64_t k, double* z, double* products, double* q,
                                     double* room, const Parallel* parallel) {
  constexpr int64_t r = kRitzVectors;
  double *h = room, *small_q = room + r * r;
  ritz_step(m, n, z, products, parallel);
  ritz_step(m, n, z, products, parallel);
  for_items(parallel, r, [&](int64_t v) {
    for (int64_t i = 0; i < n; ++i) products[v * n + i] = dot(m + i * n, z + v * n, n);
  });
  for (int64_t a = 0; a < r; ++a) {
    for (int64_t b = 0; b < r; ++b) h[a * r + b] = dot(z + larger(a, b) * n, products + smaller(a, b) * n, n);
  }
  const Smoothed found = smoothed_top(h, r, k, small_q, room + 2 * r * r);
  for (int64_t i = 0; q != nullptr && i < n; ++i) {
    for (int64_t b = 0; b < r; ++b) {
      double sum = 0;
      for (int64_t a = 0; a < r; ++a) sum += z[a * n + i] * small_q[a * r + b];
      q[i * r + b] = sum;
    }
  }
  return found;
}

// Doubles that either takes beside M, z and products.
LIPFAST_INLINE int64_t smoothed_top_size(int64_t n) {
  return n <= kDenseOutputs ? 3 * n * n : 5 * kRitzVectors * kRitzVectors;
}

#endif

// Steps of a descent and how the gradient turned along them: L-BFGS (Nocedal and Wright 2006, algorithm 7.4).
#ifndef LIPFAST_CHAIN_QUADRATIC_MEMORY_INL_H
#define LIPFAST_CHAIN_QUADRATIC_MEMORY_INL_H

#include "vector-inl.h"

constexpr int64_t kRemembered = 8;

struct LimitedMemory {
  double *steps, *turns;  // kRemembered vectors of n each, in a ring
  int64_t n, count, next;

  LIPFAST_INLINE void forget() { count = 0; }

  // Remembers to - from, and the gradients there, unless the curvature is not positive.
  inline void add(const double* from, const double* to, const double* gradient, const double* turned) {
    double *step = steps + next * n, *turn = turns + next * n;
    for (int64_t u = 0; u < n; ++u) {
      step[u] = to[u] - from[u];
      turn[u] = turned[u] - gradient[u];
    }
    if (!(dot(step, turn, n) > 1e-10 * sqrt(dot(step, step, n) * dot(turn, turn, n)))) return;
    next = (next + 1) % kRemembered;
    count = smaller(count + 1, kRemembered);
  }

  // x = the inverse Hessian, as remembered, times x; count > 0.
  inline void multiply(double* x) const {
    double factors[kRemembered];
    for (int64_t k = 1; k <= count; ++k) {
      const int64_t at = (next - k + kRemembered) % kRemembered;
      factors[at] = dot(steps + at * n, x, n) / dot(steps + at * n, turns + at * n, n);
      axpy(-factors[at], turns + at * n, x, n);
    }
    const int64_t last = (next - 1 + kRemembered) % kRemembered;
    scale(dot(steps + last * n, turns + last * n, n) / dot(turns + last * n, turns + last * n, n), x, n);
    for (int64_t k = count; k >= 1; --k) {
      const int64_t at = (next - k + kRemembered) % kRemembered;
      const double back = dot(turns + at * n, x, n) / dot(steps + at * n, turns + at * n, n);
      axpy(factors[at] - back, steps + at * n, x, n);
    }
  }
};

#endif

// Lanczos with full reorthogonalisation for the largest eigenvalue of a positive semidefinite operator, given as a
// function z = A v. All vectors are float64, whatever the operator computes in.
#ifndef LIPFAST_LANCZOS_INL_H
#define LIPFAST_LANCZOS_INL_H

#include "tridiagonal-inl.h"

struct LanczosResult {
  double value;  // Ritz value: a lower estimate of the largest eigenvalue, up to rounding
  double error;  // estimate of what is missing: min(residual, residual^2 / gap)
  int32_t passes;
  double gap;  // from the value to the second one, estimated
};

constexpr int64_t kBasis = 64;        // vectors kept before a restart
constexpr int64_t kLargeBasis = 120;  // for operators larger than 2000

LIPFAST_INLINE int64_t basis_vectors(int64_t n) { return smaller(n, n > 2000 ? kLargeBasis : kBasis); }
inline int64_t lanczos_size(int64_t n) { return (basis_vectors(n) + 2) * n + 6 * (kLargeBasis + 1); }

inline void random_vector(uint64_t seed, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = random_value(seed);
}

inline double normalize(double* x, int64_t n) {
  const double norm = sqrt(dot(x, x, n));
  if (norm > 0) scale(1 / norm, x, n);
  return norm;
}

// w orthogonal to the first `count` basis vectors; the second pass only where the first took much away (Kahan and
// Parlett: twice is enough). Returns the norm that is left.
inline double orthogonalize(const double* basis, int64_t count, double* w, int64_t n) {
  double before = sqrt(dot(w, w, n));
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < count; ++i) axpy(-dot(basis + i * n, w, n), basis + i * n, w, n);
    const double after = sqrt(dot(w, w, n));
    if (after > 0.7 * before) return after;
    before = after;
  }
  return before;
}

// Lanczos' orthonormal polynomials at a value above their zeros: off[j] p_{j+1} = (value - diagonal[j]) p_j -
// off[j-1] p_{j-1}. use(j, p_j) for j = 0 to size; false where one is beyond reach.
template <class Use>
bool orthonormal_polynomials(const double* diagonal, const double* off, int64_t size, double value, const Use& use) {
  double p = 1, before = 0;
  use(0, p);
  for (int64_t j = 0; j < size; ++j) {
    const double following = (value - diagonal[j]) * p - (j > 0 ? off[j - 1] * before : 0);
    if (!(following < 1e100 * off[j])) return false;
    before = p;
    p = following / off[j];
    use(j + 1, p);
  }
  return true;
}

// The largest share of the start's squared length in the eigenspace of `value`, above all Ritz values: 1 / sum p_j^2
// (Christoffel's function), whatever the operator. lipfast/ops/_conv_lanczos.py has the same in Python, where the
// operator is torch's convolution.
inline double unseen_share(const double* diagonal, const double* off, int64_t size, double value) {
  double sum = 0;
  const bool finite = orthonormal_polynomials(diagonal, off, size, value, [&](int64_t, double p) { sum += p * p; });
  return finite ? 1 / sum : 0;
}

// By what such a share grows from the start to the Ritz vector.
inline double amplified(const double* diagonal, const double* off, int64_t size, const double* ritz, double value) {
  double sum = 0;
  const bool finite = orthonormal_polynomials(diagonal, off, size, value, [&](int64_t j, double p) {
    if (j < size) sum += ritz[j] * p;
  });
  return finite ? sum * sum : INFINITY;
}

// What counts as missed by chance: a thousandth of the share of a random start that any direction has on average.
constexpr double kLeastShare = 1e-3;

// x: unit start vector in, Ritz vector (unit) out. tolerance: relative, on the eigenvalue. work: lanczos_size(n).
// Convergence is looked at after each of the first check_all steps (a good start may need no more), then every third,
// or every sixth while it is far. random: the share of x's squared length that prefers no direction; the end is then
// where no eigenvalue above value (1 + tolerance) is likely to have been missed. 0: the caller finds out.
template <class Operator>
LanczosResult lanczos(Operator& apply, int64_t n, int32_t max_passes, double tolerance, double* x, double* work,
                      int64_t check_all = 0, double random = 0) {
  const int64_t limit = basis_vectors(n);
  double* basis = work;
  double* w = basis + limit * n;
  double* diagonal = w + 2 * n;
  double* off = diagonal + kLargeBasis + 1;
  double* ritz = off + kLargeBasis + 1;
  double* scratch = ritz + kLargeBasis + 1;
  double least = kLeastShare * random / static_cast<double>(n);
  LanczosResult result{0, 0, 0, 0};
  for (;;) {
    memcpy(basis, x, sizeof(double) * n);
    int64_t size = 0, check = smaller<int64_t>(6, limit);
    bool done = false;
    while (!done && size < limit) {
      const double* q = basis + size * n;
      apply(q, w);
      ++result.passes;
      diagonal[size] = dot(q, w, n);
      axpy(-diagonal[size], q, w, n);
      if (size > 0) axpy(-off[size - 1], q - n, w, n);
      ++size;
      const double next = orthogonalize(basis, size, w, n);
      off[size - 1] = next;
      const bool last = size == limit || result.passes >= max_passes;
      if (size >= check || size < check_all || last || next <= 1e-14 * fabs(diagonal[0])) {
        result.value = largest_eigenvalue(diagonal, off, size);
        top_eigenvector(diagonal, off, size, result.value, ritz, scratch);
        const double residual = next * fabs(ritz[size - 1]);
        result.error = residual;
        if (size > 1) {
          result.gap = result.value - second_eigenvalue(diagonal, off, size, result.value);
          result.error = smaller(residual, residual * residual / larger(result.gap, 1e-300));
        }
        check = size + (result.error > 1e3 * tolerance * result.value ? 6 : 3);
        const bool converged =
            result.error <= tolerance * result.value &&
            (random == 0 || unseen_share(diagonal, off, size, result.value * (1 + tolerance)) <= least);
        done = converged || next <= 1e-14 * fabs(result.value) || !(result.value > 0);
      }
      if (result.passes >= max_passes) done = true;
      if (!done && size < limit) {
        memcpy(basis + size * n, w, sizeof(double) * n);
        scale(1 / next, basis + size * n, n);
      }
    }
    for (int64_t i = 0; i < n; ++i) x[i] = 0;
    for (int64_t i = 0; i < size; ++i) axpy(ritz[i], basis + i * n, x, n);
    normalize(x, n);
    if (done) return result;
    if (random > 0) least *= amplified(diagonal, off, size, ritz, result.value * (1 + tolerance));
  }
}

// The published method: `passes` power iterations, no stopping rule. The value is the last Rayleigh quotient.
template <class Operator>
LanczosResult power_iteration(Operator& apply, int64_t n, int32_t passes, double* x, double* work) {
  LanczosResult result{0, 0, 0, 0};
  for (; result.passes < passes; ++result.passes) {
    apply(x, work);
    result.value = dot(x, work, n);
    const double previous = result.value;
    if (!(dot(work, work, n) > 0)) break;
    memcpy(x, work, sizeof(double) * n);
    result.error = normalize(x, n) - previous;
  }
  return result;
}

#endif

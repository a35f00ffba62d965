// Body of spectral_norms, once per instruction set.
#ifndef LIPFAST_SPECTRAL_NORMS_INL_H
#define LIPFAST_SPECTRAL_NORMS_INL_H

#include "block_lanczos-inl.h"
#include "cholesky-inl.h"
#include "gram-inl.h"
#include "lanczos-inl.h"
#include "matrix-inl.h"

// What is random of a start vector beside the caller's: much where only chance says that nothing was missed.
inline double random_length(const SpectralProblem& problem) { return problem.certify ? 1e-4 : 0.1; }

// What lanczos() is told of the start: with a caller's vector it is less by a hundred, and a start nearby should cost
// fewer passes than none, so that what is missed by chance is a tenth of the average there.
inline double random_share(const SpectralProblem& problem) { return problem.certify ? 0 : 1; }

// Without a certificate the stream depends on the matrix as well, so that none is made for it.
inline uint64_t start_seed(const SpectralProblem& problem, double largest) {
  uint64_t bits;
  memcpy(&bits, &largest, sizeof(bits));
  return problem.certify ? problem.seed : problem.seed ^ bits;
}

// A start vector from a checkpoint nearby may need no more than a step or two: look after each of the first.
inline int64_t warm_steps(const SpectralProblem& problem) { return problem.start != nullptr ? 8 : 0; }

struct GramOperator {
  const double* g;
  int64_t s;
  void operator()(const double* in, double* out) const { multiply_symmetric(g, s, in, out); }
};

// Proved lower bound of the scaled norm from a vector x on either side; y (unit on return) is the image's direction.
template <class T>
double certified_lower(const Matrix<T>& w, bool transposed, const Parallel* parallel, const double* x, double* y,
                       double* bound) {
  const int64_t inner = transposed ? w.rows : w.cols, outer = transposed ? w.cols : w.rows;
  multiply(w, transposed, parallel, x, y, bound);
  const double image = sqrt(dot(y, y, outer)), error = widened(sqrt(dot(bound, bound, outer)));
  const double size = sqrt(dot(x, x, inner));
  normalize(y, outer);
  const double numerator = image * (1 - gamma(outer + 2)) - gamma(inner + 1) * error;
  return quotient_below(numerator, size, inner + 2);
}

// ||W||_2 <= min(sqrt(||W||_1 ||W||_inf), ||W||_F), of the scaled matrix. column: cols doubles.
template <class T>
double holder_upper(const Matrix<T>& w, double* column) {
  double row_sum = 0, column_sum = 0, squares = 0;
  for (int64_t j = 0; j < w.cols; ++j) column[j] = 0;
  for (int64_t i = 0; i < w.rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < w.cols; ++j) {
      const double entry = fabs(w.scaling(w.data[i * w.cols + j]));
      sum += entry;
      column[j] += entry;
      squares += entry * entry;
    }
    row_sum = larger(row_sum, sum);
  }
  for (int64_t j = 0; j < w.cols; ++j) column_sum = larger(column_sum, column[j]);
  const double widen = 1 + gamma(w.rows * w.cols + 8);
  return up(widened(sqrt(smaller(squares, row_sum * column_sum) * widen + kTiny), 4));
}

// The certificate: everything about t I - G for one matrix.
struct Certificate {
  double* g;         // upper triangle: G; below: the last factor
  int64_t s, l;      // sides
  double* diagonal;  // s: the factor's diagonal
  double* panels;
  double trace;  // of G
  const Parallel* parallel;

  // Tries to prove lambda_max(B B^T) <= the value written to `bound` with the shift t.
  bool prove(double t, double* bound) const {
    const int64_t ld = leading_dimension(s);
    double sum = 0, largest = 0;
    for (int64_t i = 0; i < s; ++i) {
      diagonal[i] = t - g[i * ld + i];
      sum += diagonal[i];
      largest = larger(largest, fabs(diagonal[i]));
    }
    if (!cholesky(g, s, diagonal, panels, parallel)) return false;
    const double factor_error = cholesky_error(gamma(s + 2)) * sum;
    const double diagonal_error = kUnitRoundoff * largest;
    const double gram_error = gamma(l) * trace / (1 - gamma(s + l));
    *bound = up(t + up(widened(factor_error + diagonal_error + gram_error) + kTiny));
    return true;
  }

  // Steps of Lanczos on the inverse of the last factor: the top of G's spectrum, far apart there, is found in three
  // solves. x: unit vector in and out. Returns the Rayleigh quotient of G at x.
  double refine(double* x, double* work) const {
    struct Inverse {
      const Certificate& certificate;
      void operator()(const double* in, double* out) const {
        memcpy(out, in, sizeof(double) * certificate.s);
        solve(certificate.g, certificate.s, certificate.diagonal, out);
      }
    } inverse{*this};
    // x may be an exact eigenvector, but of a smaller eigenvalue: a little noise leads out of it.
    random_vector(static_cast<uint64_t>(s), work, s);
    axpy(1e-4 / sqrt(dot(work, work, s)), work, x, s);
    normalize(x, s);
    lanczos(inverse, s, 4, 1e-14, x, work);
    multiply_symmetric(g, s, x, work);
    return dot(x, work, s);
  }
};

// Proved upper bound of lambda_max(B B^T), within about rtol of `value` (times 1 + rtol: the square's share of a gap
// of rtol / 2 in the norm). The first shift is generous when the estimate is poor; its factor then gives a better
// one. A failed factorisation proves nothing and costs time only.
inline double certified_upper(const Certificate& certificate, double value, double error, double rtol, double* x,
                              double* work) {
  const double ceiling = certificate.trace * (1 + 1e-6) + 0x1p-800;
  double t = error <= 0.25 * rtol * value ? value * (1 + rtol) : value + 10 * error;
  double failed = 0, proved = INFINITY, best = INFINITY;
  for (int attempt = 0; attempt < 40; ++attempt) {
    t = smaller(t, ceiling);
    double bound;
    if (certificate.prove(t, &bound)) {
      proved = t;
      best = smaller(best, bound);
      if (best <= value * (1 + 1.5 * rtol)) break;
      value = larger(value, certificate.refine(x, work));
      if (best <= value * (1 + 1.5 * rtol)) break;
      t = value * (1 + rtol);
      if (t <= failed) t = 0.5 * (failed + proved);
      // Below this distance the rounding terms, not the shift, decide: nothing is left to gain.
      if (proved - t <= 1e-15 * proved || best - proved > 8 * (proved - value)) break;
    } else {
      if (t >= ceiling && proved == INFINITY) break;
      failed = larger(failed, t);
      t = proved < INFINITY ? 0.5 * (failed + proved) : value + 16 * (t - value) + 1e-15 * value;
    }
  }
  return best;
}

// Lanczos on W itself. x: unit start vector in, right singular vector out. tolerance: relative, on the square.
template <class T>
LanczosResult estimate(const Matrix<T>& w, const SpectralProblem& problem, double tolerance, double* x, double* work) {
  const int64_t rows = w.rows, cols = w.cols;
  if (problem.method == SpectralMethod::kLanczos && spectral_norms_uses_blocks(problem)) {
    MatrixOperator<T, kBlockVectors> apply(w, problem.parallel, reinterpret_cast<T*>(work));
    work += MatrixOperator<double, kBlockVectors>::size(rows, cols);
    return block_lanczos(apply, cols, problem.max_passes, tolerance, x, work, problem.certify);
  }
  MatrixOperator<T, 1> apply(w, problem.parallel, reinterpret_cast<T*>(work));
  work += MatrixOperator<double, 1>::size(rows, cols);
  if (problem.method == SpectralMethod::kPower) return power_iteration(apply, cols, problem.max_passes, x, work);
  return lanczos(apply, cols, problem.max_passes, tolerance, x, work, warm_steps(problem), random_share(problem));
}

// With a Gram matrix at hand: its largest eigenvalue and unit eigenvector x. Lanczos runs on G, in float64, unless W is
// large: then on W, in its own type and with all threads. right: the start vector; overwritten.
template <class T>
LanczosResult find_top(const Matrix<T>& w, const SpectralProblem& problem, const Certificate& certificate,
                       double* right, double* x, double* bound, double* work) {
  const int64_t s = certificate.s;
  const bool wide = w.rows <= w.cols, on_w = problem.parallel != nullptr;
  const double tolerance = 0.2 * problem.rtol;
  LanczosResult found{};
  if (on_w) found = estimate(w, problem, tolerance, right, work);
  if (wide) multiply(w, false, problem.parallel, right, x, bound);
  if (wide && !(normalize(x, s) > 0)) {
    random_vector(problem.seed, x, s);
    normalize(x, s);
  }
  const GramOperator gram_operator{certificate.g, s};
  if (on_w) {
    gram_operator(x, work);
    const double value = dot(x, work, s);
    found.error += larger(0.0, found.value - value);
    found.value = value;
    return found;
  }
  if (problem.method == SpectralMethod::kPower) {
    return power_iteration(gram_operator, s, problem.max_passes, x, work);
  }
  return lanczos(gram_operator, s, problem.max_passes, tolerance, x, work, warm_steps(problem), random_share(problem));
}

template <class T>
void spectral_norms_of(const SpectralProblem& problem, SpectralResult& result, double* work) {
  const T* data = static_cast<const T*>(problem.data);
  const int64_t rows = problem.rows, cols = problem.cols;
  Matrix<T> w;
  result.passes = 0;
  result.finite = examine(data, rows, cols, problem.parallel, w);
  if (!result.finite) return;

  const bool wide = rows <= cols;
  const int64_t s = smaller(rows, cols), l = larger(rows, cols);
  double* bound = work;
  work += l;
  random_vector(start_seed(problem, w.largest), result.right, cols);
  normalize(result.right, cols);
  if (problem.start != nullptr) {
    // A start vector may lie in an invariant subspace without the top singular vector: a little of a random one
    // leads out of it.
    double norm = sqrt(dot(problem.start, problem.start, cols));
    if (norm > 0 && norm < INFINITY) {
      scale(random_length(problem), result.right, cols);
      axpy(1 / norm, problem.start, result.right, cols);
      normalize(result.right, cols);
    }
  }
  if (w.largest == 0) {
    result.lower = 0;
    result.upper = problem.certify ? 0 : INFINITY;
    result.upper_method = problem.certify ? UpperMethod::kCholesky : UpperMethod::kNone;
    random_vector(problem.seed, result.left, rows);
    normalize(result.left, rows);
    return;
  }

  double value_lower = 0, scaled_upper = INFINITY;
  result.upper_method = UpperMethod::kNone;
  if (spectral_norms_uses_gram(problem)) {
    Certificate certificate{work, s, l, nullptr, nullptr, 0, problem.parallel};
    certificate.diagonal = work + square_size(s);
    certificate.panels = certificate.diagonal + s;
    double* rest = certificate.panels + larger(gram_panels_size(s), cholesky_panels_size(s));
    gram(data, rows, cols, w.scaling, certificate.g, certificate.panels, problem.parallel);
    for (int64_t i = 0; i < s; ++i) certificate.trace += certificate.g[i * leading_dimension(s) + i];
    double* x = wide ? result.left : result.right;
    const LanczosResult found = find_top(w, problem, certificate, result.right, x, bound, rest);
    result.passes = found.passes;
    if (problem.certify) {
      const double top = certified_upper(certificate, found.value, found.error, problem.rtol, x, rest);
      scaled_upper = up(sqrt(top));
      result.upper_method = UpperMethod::kCholesky;
    }
    value_lower = certified_lower(w, wide, problem.parallel, x, wide ? result.right : result.left, bound);
  } else {
    const LanczosResult found = estimate(w, problem, 2 * problem.rtol, result.right, work);
    result.passes = found.passes;
    value_lower = certified_lower(w, false, problem.parallel, result.right, result.left, bound);
  }
  // A pass of its own over W: only where nothing tight was proved.
  if (problem.certify && !(scaled_upper <= value_lower * (1 + 2 * problem.rtol))) {
    const double holder = holder_upper(w, bound);
    if (holder < scaled_upper) {
      scaled_upper = holder;
      result.upper_method = UpperMethod::kHolder;
    }
  }
  // The largest entry is a lower bound without any rounding.
  result.lower = larger(unscale_down(value_lower, w.exponent), w.largest);
  result.upper = unscale_up(scaled_upper, w.exponent);
}

SpectralNormsKernel spectral_kernel(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? spectral_norms_of<float> : spectral_norms_of<double>;
}

inline int64_t estimate_size(const SpectralProblem& problem) {
  if (!spectral_norms_uses_blocks(problem)) {
    return MatrixOperator<double, 1>::size(problem.rows, problem.cols) + lanczos_size(problem.cols);
  }
  return MatrixOperator<double, kBlockVectors>::size(problem.rows, problem.cols) + block_lanczos_size(problem.cols);
}

inline int64_t spectral_norms_workspace(const SpectralProblem& problem) {
  const int64_t s = smaller(problem.rows, problem.cols), l = larger(problem.rows, problem.cols);
  if (!spectral_norms_uses_gram(problem)) return l + estimate_size(problem);
  const int64_t search = spectral_norms_is_large(problem) ? estimate_size(problem) : 0;
  return l + square_size(s) + s + larger(gram_panels_size(s), cholesky_panels_size(s)) +
         larger(lanczos_size(s), search);
}

#endif

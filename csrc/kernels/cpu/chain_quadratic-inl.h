// Body of chain_quadratic, once per instruction set.
#ifndef LIPFAST_CHAIN_QUADRATIC_INL_H
#define LIPFAST_CHAIN_QUADRATIC_INL_H

#include "chain_quadratic_certificate-inl.h"
#include "chain_quadratic_search-inl.h"

constexpr int kAttempts = 6;  // to factor with larger multipliers

// Squares of all weights, and two vectors.
inline int64_t balance_size(const QuadraticProblem& problem) {
  int64_t count = 2 * widest_layer(problem);
  for (int64_t i = 0; i < problem.layers; ++i) count += problem.sizes[i] * problem.sizes[i + 1];
  return count;
}

// Exponents of units and matrices; false where a number is not finite or beyond what the proof takes.
template <class T>
bool balance(const QuadraticProblem& problem, const QuadraticResult& result, Arena arena) {
  double* squares = arena.take<double>(balance_size(problem));
  const int64_t widest = widest_layer(problem), hidden = problem.layers - 1;
  double* room = squares + balance_size(problem) - 2 * widest;
  int64_t begin = 0;
  bool right = true;
  for (int64_t i = 0; i < problem.layers; ++i) {
    const int64_t rows = problem.sizes[i + 1], columns = problem.sizes[i];
    int exponent = 0;
    right &= scaled_squares(static_cast<const T*>(problem.weights[i]), rows, columns, problem.parallel, squares + begin,
                            &exponent);
    result.weight_exponents[i] = exponent;
    begin += rows * columns;
  }
  for (int64_t i = 0; i < hidden; ++i) {
    for (int64_t j = 0; j < problem.sizes[i + 1]; ++j) {
      right &= fabs(problem.means[i][j]) <= kMostEntry && fabs(problem.products[i][j]) <= kMostEntry;
    }
  }
  if (!right) return false;
  balance_units(problem, squares, result.unit_exponents, room, widest);
  begin = 0;
  for (int64_t i = 0; i < problem.layers; ++i) {
    const int64_t rows = problem.sizes[i + 1], columns = problem.sizes[i];
    result.weight_exponents[i] =
        norm_exponent(squares + begin, rows, columns, i < hidden ? result.unit_exponents[i] : nullptr,
                      i > 0 ? result.unit_exponents[i - 1] : nullptr, room, result.weight_exponents[i]);
    begin += rows * columns;
  }
  return true;
}

// The multipliers with which to prove, as they are found in S's arithmetic, and about rho^2; 0: none were found. A
// single evaluation is one step that is left to the certificate, which costs little more than a sweep: `tried` is false
// then, `logs` has the multipliers before it, and rho^2 is of them.
template <class S, class T>
double search_multipliers(const QuadraticProblem& problem, QuadraticResult& result, Arena arena) {
  Search<S> search(problem, arena);
  search.unit = result.unit_exponents;
  search.base = result.weight_exponents;
  const bool carried = problem.start != nullptr && search.template start<T>(problem, true, kShare);
  const bool found = carried || (!search.sweep.stopped && search.template cold_start<T>(problem));
  // Where an earlier result says little of these weights, or nothing, one step is not enough.
  int64_t least_evaluations = 0;
  if (problem.start != nullptr) least_evaluations = !carried ? kColdEvaluations : search.far ? kFarEvaluations : 0;
  const int64_t evaluations = larger(problem.evaluations, least_evaluations);
  result.tried = evaluations != 1;
  double least = 0;
  if (found) least = result.tried ? search.improve(evaluations) : search.step_once();
  result.evaluations += static_cast<int32_t>(search.evaluated);
  if (!found || search.sweep.stopped) return 0;
  const double* log_d = result.tried ? search.best : search.here;
  const double* before = search.best;
  for (int64_t i = 0; i < problem.layers; ++i) result.weight_exponents[i] = search.shifts[i];
  for (int64_t i = 0; i + 1 < problem.layers; ++i) {
    for (int64_t j = 0; j < problem.sizes[i + 1]; ++j) {
      result.multipliers[i][j] = exp(*log_d++);
      if (!result.tried) result.logs[i][j] = exp(*before++);
    }
  }
  return larger(least, 0x1p-200);  // M = 0
}

// Largest eigenvalue of what the last block is less by, from below. m, room: of a sweep.
inline double certified_top(const ChainCertificate& certificate, double* m, double* z, double* products, double* room) {
  const int64_t n = certificate.sizes[certificate.layers];
  const double epsilon = block_epsilon(certificate.sizes, certificate.layers, certificate.layers);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) m[i * n + j] = m[j * n + i] = certificate.k.entry(i, j);
    m[i * n + i] += certificate.loss[i] - certificate.next_a[i] + 2 * epsilon * fabs(certificate.next_a[i]);
  }
  if (n <= kDenseOutputs) return smoothed_top(m, n, kMostPower, nullptr, room).top;
  for (int64_t v = 0; v < kRitzVectors; ++v) random_vector(static_cast<uint64_t>(v), z + v * n, n);
  for (int step = 0; step < 4; ++step) ritz_step(m, n, z, products, certificate.parallel);
  return smoothed_top_of_many(m, n, kMostPower, z, products, nullptr, room, certificate.parallel).top;
}

// The smallest rho^2 above `top` that is proved, nearly; infinite: none.
inline double proved_square(ChainCertificate& certificate, double top) {
  const double least = larger(1e-9, 8 * block_epsilon(certificate.sizes, certificate.layers, certificate.layers));
  top = larger(top, kLeastDiagonal * 4);
  double failed = 0, excess = least;
  for (int attempt = 0; !certificate.prove(top * (1 + excess)); ++attempt) {
    if (attempt == 12) return INFINITY;
    failed = excess;
    excess *= attempt == 0 ? 4 : 8;
  }
  const bool small = certificate.sizes[certificate.layers] <= kDenseOutputs;
  for (int halving = 0; small && failed > 0 && halving < 10 && excess > 1.2 * failed; ++halving) {
    const double middle = sqrt(failed * excess);
    (certificate.prove(top * (1 + middle)) ? excess : failed) = middle;
  }
  return top * (1 + excess);
}

// Proves a bound with the multipliers of `result`, or with larger ones, so many times, where a hidden block cannot be
// factored.
template <class T>
void certify(const QuadraticProblem& problem, QuadraticResult& result, Arena arena, double guess, double growth,
             int attempts) {
  const int64_t outputs = problem.sizes[problem.layers];
  const bool dense = outputs <= kDenseOutputs;
  double* m = arena.take<double>(outputs * outputs);
  double* z = arena.take<double>(dense ? 0 : outputs * kRitzVectors);
  double* products = arena.take<double>(dense ? 0 : outputs * kRitzVectors);
  double* room = arena.take<double>(smoothed_top_size(outputs));
  ChainCertificate certificate(problem, arena);
  certificate.unit = result.unit_exponents;
  certificate.shifts = result.weight_exponents;
  certificate.d = result.multipliers;
  for (int64_t b = 1; b <= problem.layers; ++b) {
    growth = larger(growth, 8 * block_epsilon(problem.sizes, problem.layers, b));
  }
  bool factored = certificate.factor_hidden<T>(guess);
  for (int attempt = 0; !factored && attempt < attempts && !asked_to_stop(problem.stop);
       ++attempt, growth *= attempt == 1 ? 4 : 30) {
    for (int64_t i = 0; i + 1 < problem.layers; ++i) {
      const double factor = pow(1 + growth, static_cast<double>(i + 1));
      for (int64_t j = 0; j < problem.sizes[i + 1]; ++j) result.multipliers[i][j] *= factor;
    }
    factored = certificate.factor_hidden<T>(guess);
  }
  result.evaluations += certificate.factorisations;
  if (factored) result.square = proved_square(certificate, certified_top(certificate, m, z, products, room));
}

// Proves a bound with the multipliers that were found, or, where those were not tried and are no better, with the ones
// before.
template <class T>
void prove_found(const QuadraticProblem& problem, QuadraticResult& result, Arena arena, double guess, double growth) {
  if (result.tried) return certify<T>(problem, result, arena, guess, growth, kAttempts);
  certify<T>(problem, result, arena, guess, growth, 0);
  const double square = result.square;
  if (square < guess) return;
  const auto turn = [&] {
    for (int64_t i = 0; i + 1 < problem.layers; ++i) {
      for (int64_t j = 0; j < problem.sizes[i + 1]; ++j) exchange(result.multipliers[i][j], result.logs[i][j]);
    }
  };
  turn();
  result.square = INFINITY;
  certify<T>(problem, result, arena, guess, growth, kAttempts);
  if (!(square < result.square)) return;
  turn();
  result.square = square;
}

// The root of rho^2 in the units of the weights as they were given, and its logarithm, both rounded up.
inline void unscale_result(const QuadraticProblem& problem, QuadraticResult& result) {
  int64_t sum = 0;
  for (int64_t i = 0; i < problem.layers; ++i) {
    sum += result.weight_exponents[i];
    if (i + 1 == problem.layers) break;
    for (int64_t j = 0; j < problem.sizes[i + 1]; ++j) {
      const double units = 2.0 * static_cast<double>(sum - result.unit_exponents[i][j]);
      result.logs[i][j] = log2(result.multipliers[i][j]) + units;
    }
  }
  if (!(result.square < INFINITY)) return;
  const double log_two = 0.6931471805599453, half = 0.5 * log(result.square),
               power = static_cast<double>(sum) * log_two;
  result.log_value = up(half + power + 8 * kUnitRoundoff * (fabs(half) + fabs(power)));
  result.value =
      unscale_up(up(sqrt(result.square)), static_cast<int>(larger<int64_t>(-5000, smaller<int64_t>(5000, sum))));
}

template <class T>
void chain_quadratic_of(const QuadraticProblem& problem, QuadraticResult& result, void* workspace) {
  result.log_value = result.value = result.square = INFINITY;
  result.evaluations = 0;
  for (int64_t i = 0; i < problem.layers; ++i) {
    result.weight_exponents[i] = 0;
    for (int64_t j = 0; i + 1 < problem.layers && j < problem.sizes[i + 1]; ++j) {
      result.multipliers[i][j] = result.logs[i][j] = NAN;
      result.unit_exponents[i][j] = 0;
    }
  }
  const Arena arena(workspace);
  if (!balance<T>(problem, result, arena)) return;
  double guess = search_multipliers<float, T>(problem, result, arena);
  if (guess > 0) prove_found<T>(problem, result, arena, guess, 1e-6);
  if (!(result.square < INFINITY) && !asked_to_stop(problem.stop)) {  // float32 did not do
    guess = search_multipliers<double, T>(problem, result, arena);
    if (guess > 0) prove_found<T>(problem, result, arena, guess, 1e-9);
  }
  unscale_result(problem, result);
}

inline int64_t chain_quadratic_bytes(const QuadraticProblem& problem) {
  Arena in_float(nullptr), in_double(nullptr), proof(nullptr);
  Search<float> first(problem, in_float);
  Search<double> second(problem, in_double);
  const int64_t outputs = problem.sizes[problem.layers];
  proof.take<double>(outputs * outputs + 2 * outputs * kRitzVectors + smoothed_top_size(outputs) + 64);
  ChainCertificate certificate(problem, proof);
  int64_t most = larger(in_float.used(), in_double.used());
  most = larger(most, proof.used());
  return larger(most, balance_size(problem) * static_cast<int64_t>(sizeof(double))) + 1024;
}

ChainQuadraticKernel chain_quadratic_for(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? chain_quadratic_of<float> : chain_quadratic_of<double>;
}

#endif

// The certificate: one Cholesky factorisation in float64 of the block tridiagonal matrix (5), its diagonal lowered by
// what all roundings, and the errors of the weights, can change (docs/bounds.md, "Quadratic constraints of a chain").
//
//   A_11 = D_1 (less W_1 W_1^T: the block of the inputs is the identity, exactly),
//   A_bb = D_b + W_b p D_{b-1} W_b^T,  A_{b+1,b} = W_{b+1} m D_b,  D_L = rho^2 I.
#ifndef LIPFAST_CHAIN_QUADRATIC_CERTIFICATE_INL_H
#define LIPFAST_CHAIN_QUADRATIC_CERTIFICATE_INL_H

#include "chain_quadratic_sweep-inl.h"

constexpr double kLeastDiagonal = 0x1p-300, kMostDiagonal = 0x1p300;
// Sums of numbers that are not negative, fewer than 2^40 of them, and a few factors.
constexpr double kUpwards = 1 + 0x1p-10;

LIPFAST_INLINE bool in_range(double v) { return v >= kLeastDiagonal && v <= kMostDiagonal; }

// epsilon_b = N (gamma_kappa / (1 - gamma_kappa) + 4 u), widened. N: the length of a row in the pattern; kappa: the
// products of an entry and 8 roundings more: W_b p D W_b^T and B B^T are summed apart, and a quotient is a product with
// a reciprocal.
inline double block_epsilon(const int64_t* sizes, int64_t layers, int64_t b) {
  const double row = static_cast<double>((b > 1 ? sizes[b - 1] : 0) + sizes[b] + (b < layers ? sizes[b + 1] : 0));
  const double error = gamma(sizes[b - 1] + sizes[b] + 8);
  return row * (error / (1 - error) + 4 * kUnitRoundoff) * kUpwards;
}

// y += factor |M| x, and y += factor |M|^T x
inline void add_absolute(const Panels<double>& m, double factor, const double* x, int64_t columns, double* y) {
  for (int64_t row = 0; row < m.rows; row += kPanelRows<double>) {
    for (int64_t k = 0; k < columns; ++k) {
      const double own = factor * x[k];
      for (int64_t r = 0; r < kPanelRows<double>; ++r) y[row + r] += own * fabs(m.at(row, k)[r]);
    }
  }
}
inline void add_absolute_transposed(const Panels<double>& m, double factor, const double* x, int64_t columns,
                                    double* y) {
  for (int64_t row = 0; row < m.rows; row += kPanelRows<double>) {
    for (int64_t k = 0; k < columns; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < kPanelRows<double>; ++r) sum += fabs(m.at(row, k)[r]) * x[row + r];
      y[k] += factor * sum;
    }
  }
}

struct ChainCertificate {
  const QuadraticProblem& problem;
  const int32_t* const* unit;
  const int32_t* shifts;
  const int64_t* sizes;
  int64_t layers;
  double* const* d;  // multipliers, per hidden layer
  Panels<double> first, w, error, curved, l, b, k, next, bend;
  double *inverse, *ones, *diagonal, *columns, *curve;
  // Of the block at hand and of the one after it: diagonal of A, what is lowered off it beside epsilon, and 1 /
  // sqrt(a).
  double *a, *loss, *size, *next_a, *next_loss, *next_size, *weighted, *sums;
  bool bent;
  int32_t factorisations;
  const Parallel* parallel;

  ChainCertificate(const QuadraticProblem& given, Arena& arena);
  template <class T>
  bool factor_hidden(double guess);
  bool prove(double square);

 private:
  template <class T>
  bool pack(int64_t b, const Panels<double>& to);
  template <class T>
  bool pack_error(int64_t b);
  template <class T>
  bool first_block();
  template <class T>
  bool next_block(int64_t b, double guess);
  bool diagonal_of_next(int64_t b, double guess);
  void lose_products(int64_t b);
  void lose_weights(int64_t b);
  bool factor(int64_t b);
};

inline ChainCertificate::ChainCertificate(const QuadraticProblem& given, Arena& arena)
    : problem(given),
      unit(nullptr),
      shifts(nullptr),
      sizes(given.sizes),
      layers(given.layers),
      d(nullptr),
      bent(false),
      factorisations(0),
      parallel(given.parallel) {
  int64_t most = 0, most_w = 0, most_l = 0, most_b = 0;
  bool errors = false;
  for (int64_t i = 1; i <= layers; ++i) {
    const int64_t rows = padded_rows<double>(sizes[i]);
    most = larger(most, rows);
    most_l = larger(most_l, rows * padded_columns(sizes[i]));
    if (i > 1) most_b = larger(most_b, rows * padded_columns(sizes[i - 1]));
    most_w = larger(most_w, rows * padded_columns(sizes[i - 1]));
    errors |= problem.errors[i - 1] != nullptr;
  }
  first = arena.panels<double>(sizes[1], padded_columns(sizes[0]));
  w.data = arena.take<double>(most_b);
  curved.data = arena.take<double>(most_b);
  error.data = arena.take<double>(errors ? most_w : 0);
  l.data = arena.take<double>(most_l);
  b.data = arena.take<double>(most_b);
  Panels<double>* const squares[] = {&k, &next, &bend};
  for (Panels<double>* square : squares) square->data = arena.take<double>(most * most);
  double** const vectors[] = {&inverse, &ones,   &diagonal,  &columns,   &curve,    &a,   &loss,
                              &size,    &next_a, &next_loss, &next_size, &weighted, &sums};
  const int64_t widest = larger(most, padded_rows<double>(sizes[0])) + kPanelRows<double>;
  for (double** vector : vectors) *vector = arena.take<double>(widest);
}

// W_b, scaled by one rounding to a denormal number at most; false outside the range of the proof.
template <class T>
bool ChainCertificate::pack(int64_t block, const Panels<double>& to) {
  const EntryScaling scaling{block < layers ? unit[block - 1] : nullptr, block > 1 ? unit[block - 2] : nullptr,
                             shifts[block - 1]};
  const double largest =
      pack_scaled(static_cast<const T*>(problem.weights[block - 1]), sizes[block], sizes[block - 1], scaling, to);
  return largest <= kMostEntry;
}

// The bounds of W_b's errors, scaled alike; a denormal result is rounded up.
template <class T>
bool ChainCertificate::pack_error(int64_t block) {
  if (problem.errors[block - 1] == nullptr) return true;
  error = {error.data, padded_rows<double>(sizes[block]), padded_columns(sizes[block - 1])};
  const EntryScaling scaling{block < layers ? unit[block - 1] : nullptr, block > 1 ? unit[block - 2] : nullptr,
                             shifts[block - 1]};
  const double largest = pack_scaled(problem.errors[block - 1], sizes[block], sizes[block - 1], scaling, error);
  bool right = largest <= kMostEntry;
  for (int64_t j = 0; j < sizes[block]; ++j) {
    for (int64_t c = 0; c < sizes[block - 1]; ++c) {
      double& entry = error.entry(j, c);
      right &= entry >= 0;
      if (entry < 0x1p-1000 && problem.errors[block - 1][j * sizes[block - 1] + c] > 0) entry += 0x1p-1000;
    }
  }
  return right;
}

// Block 1: K = W_1 W_1^T, and where W_1 has errors the sums over rows of Z + Z^T + E E^T, Z = |W_1| E^T.
template <class T>
bool ChainCertificate::first_block() {
  const int64_t n = sizes[1], inputs = sizes[0];
  k = {k.data, padded_rows<double>(n), padded_rows<double>(n)};
  if (!pack<T>(1, first) || !pack_error<T>(1)) return false;
  symmetric_product(first, first, k, parallel);
  for (int64_t j = 0; j < k.rows; ++j) loss[j] = size[j] = 0;
  for (int64_t j = 0; j < n; ++j) {
    a[j] = d[0][j];
    if (!in_range(a[j])) return false;
    size[j] = 1 / sqrt(a[j]);
  }
  if (problem.errors[0] == nullptr) return true;
  for (int64_t c = 0; c < inputs; ++c) weighted[c] = sums[c] = 0;
  add_absolute_transposed(error, 1, size, inputs, weighted);  // E^T v
  add_absolute_transposed(first, 1, size, inputs, sums);      // |W|^T v
  add_absolute(first, 1, weighted, inputs, loss);
  add_absolute(error, 1, sums, inputs, loss);
  add_absolute(error, 1, weighted, inputs, loss);
  for (int64_t j = 0; j < n; ++j) loss[j] *= kUpwards / size[j];
  return true;
}

// The diagonal of block b + 1; D of the last is a guess, not too small, which only weighs sums over rows.
inline bool ChainCertificate::diagonal_of_next(int64_t block, double guess) {
  const int64_t n = sizes[block], outputs = sizes[block + 1];
  bent = false;
  for (int64_t c = 0; c < w.columns; ++c) curve[c] = 0;
  for (int64_t c = 0; c < n; ++c) {
    curve[c] = problem.products[block - 1][c] * d[block - 1][c];
    bent |= problem.products[block - 1][c] != 0;
  }
  const int64_t rows = padded_rows<double>(outputs);
  for (int64_t j = 0; j < rows; ++j) next_loss[j] = next_size[j] = 0;
  if (bent) {
    curved = {curved.data, w.rows, w.columns};
    for (int64_t row = 0; row < rows; row += kPanelRows<double>) {
      for (int64_t c = 0; c < w.columns; ++c) {
        for (int64_t r = 0; r < kPanelRows<double>; ++r) curved.at(row, c)[r] = curve[c] * w.at(row, c)[r];
      }
    }
    bend = {bend.data, rows, rows};
    symmetric_product(curved, w, bend, parallel);
  }
  for (int64_t j = 0; j < outputs; ++j) {
    next_a[j] = (block + 1 < layers ? d[block][j] : 1.01 * guess) + (bent ? bend.entry(j, j) : 0);
    if (!in_range(next_a[j]) || (block + 1 < layers && !in_range(d[block][j]))) return false;
    next_size[j] = 1 / sqrt(next_a[j]);
  }
  return true;
}

// gamma_{n+8} sqrt(a) |W| |p| D |W|^T a^-1/2, and with errors of W the sums over rows of Z + Z^T + E |p| D E^T,
// Z = |W| |p| D E^T.
inline void ChainCertificate::lose_products(int64_t block) {
  const int64_t n = sizes[block], outputs = sizes[block + 1];
  const bool errors = problem.errors[block] != nullptr;
  if (!bent) return;
  for (int64_t c = 0; c < n; ++c) weighted[c] = sums[c] = 0;
  add_absolute_transposed(w, 1, next_size, n, sums);
  if (errors) add_absolute_transposed(error, 1, next_size, n, weighted);
  for (int64_t c = 0; c < n; ++c) {
    sums[c] *= fabs(curve[c]);
    weighted[c] *= fabs(curve[c]);
  }
  add_absolute(w, gamma(n + 8), sums, n, next_loss);
  if (errors) {
    add_absolute(w, 1, weighted, n, next_loss);
    add_absolute(error, 1, sums, n, next_loss);
    add_absolute(error, 1, weighted, n, next_loss);
  }
  for (int64_t j = 0; j < outputs; ++j) next_loss[j] *= kUpwards / next_size[j];
}

// Errors of W_{b+1} in A_{b+1,b}: 2 |s_j E_jk m_k D_k s_k| <= E_jk |m_k| D_k (tau s_j^2 + s_k^2 / tau), tau = sqrt(a_j
// / a_k).
inline void ChainCertificate::lose_weights(int64_t block) {
  const int64_t n = sizes[block], outputs = sizes[block + 1];
  if (problem.errors[block] == nullptr) return;
  const int64_t rows = error.rows;
  for (int64_t j = 0; j < rows; ++j) sums[j] = 0;
  for (int64_t c = 0; c < n; ++c) weighted[c] = fabs(columns[c]) * size[c];
  add_absolute(error, 1, weighted, n, sums);
  for (int64_t j = 0; j < outputs; ++j) next_loss[j] += kUpwards * sums[j] / next_size[j];
  for (int64_t c = 0; c < n; ++c) sums[c] = 0;
  add_absolute_transposed(error, 1, next_size, n, sums);
  for (int64_t c = 0; c < n; ++c) loss[c] += kUpwards * sums[c] * fabs(columns[c]) / size[c];
}

// Factors block b with the rows of W_{b+1} below it, and forms what the next block is less by.
inline bool ChainCertificate::factor(int64_t block) {
  const int64_t n = sizes[block];
  const double epsilon = block_epsilon(sizes, layers, block);
  l = {l.data, padded_rows<double>(n), padded_columns(n)};
  for (int64_t j = 0; j < l.rows; ++j) ones[j] = diagonal[j] = 1;
  for (int64_t j = 0; j < n; ++j) {
    diagonal[j] = nextafter(a[j] - kUpwards * (epsilon * a[j] + loss[j]), -INFINITY);
    if (!(diagonal[j] > 0)) return false;
  }
  b = {b.data, w.rows, w.columns};
  const Step<double> step{k, w, diagonal, nullptr, columns, l, b, inverse};
  if (!factor_step(step, parallel)) return false;
  next = {next.data, w.rows, w.rows};
  symmetric_product(b, b, next, parallel);
  if (bent) {  // the diagonal's share is in a
    for (int64_t j = 0; j < sizes[block + 1]; ++j) {
      for (int64_t c = 0; c < j; ++c) next.entry(j, c) -= bend.entry(j, c);
    }
  }
  return true;
}

template <class T>
bool ChainCertificate::next_block(int64_t block, double guess) {
  if (asked_to_stop(problem.stop)) return false;
  const int64_t n = sizes[block];
  w = {w.data, padded_rows<double>(sizes[block + 1]), padded_columns(n)};
  if (!pack<T>(block + 1, w) || !pack_error<T>(block + 1)) return false;
  for (int64_t c = 0; c < w.columns; ++c) columns[c] = 0;
  for (int64_t c = 0; c < n; ++c) columns[c] = problem.means[block - 1][c] * d[block - 1][c];
  if (!diagonal_of_next(block, guess)) return false;
  lose_products(block);
  lose_weights(block);
  if (!factor(block)) return false;
  exchange(k, next);
  exchange(a, next_a);
  exchange(loss, next_loss);
  exchange(size, next_size);
  return true;
}

// All blocks but the last, which K, a and loss are then of. guess: about rho^2.
template <class T>
bool ChainCertificate::factor_hidden(double guess) {
  ++factorisations;
  if (!in_range(guess) || !first_block<T>()) return false;
  for (int64_t block = 1; block < layers; ++block) {
    if (!next_block<T>(block, guess)) return false;
  }
  for (int64_t j = 0; j < sizes[layers]; ++j) next_a[j] = bent ? bend.entry(j, j) : 0;
  return true;
}

// Whether the last block of A can be factored with this rho^2: then the constant is at most rho.
inline bool ChainCertificate::prove(double square) {
  const int64_t n = sizes[layers];
  const double epsilon = block_epsilon(sizes, layers, layers);
  l = {l.data, padded_rows<double>(n), padded_columns(n)};
  for (int64_t j = 0; j < l.rows; ++j) diagonal[j] = columns[j] = 1;
  if (!in_range(square)) return false;
  for (int64_t j = 0; j < n; ++j) {
    const double own = square + next_a[j];
    if (!in_range(own)) return false;
    diagonal[j] = nextafter(own - kUpwards * (epsilon * own + loss[j]), -INFINITY);
    if (!(diagonal[j] > 0)) return false;
  }
  const Panels<double> none{nullptr, 0, l.columns};
  const Step<double> step{k, none, diagonal, nullptr, columns, l, none, inverse};
  return factor_step(step, parallel);
}

#endif

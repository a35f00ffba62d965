// What one block does with one matrix between products, whoever forms those; the contract is in spectral_norms.h.
#pragma once

#include "../rounding.h"
#include "lanczos.cuh"
#include "matrix.cuh"

namespace lipfast::cuda {

// rounding.h's, without its calls of nextafter. Above v, which is positive and normal: v times 2^-52 is at least the
// distance to the next number.
__device__ inline double up(double v) { return v * (1 + 0x1p-52); }
// 2^e value, rounded in the direction of the bound where the result is denormal: neighbours are 2^-1074 apart there.
__device__ inline double unscale_up(double value, int exponent) {
  const double scaled = ldexp(value, exponent);
  return scaled < 0x1p-1021 && value > 0 ? scaled + 0x1p-1074 : scaled;
}
__device__ inline double unscale_down(double value, int exponent) {
  const double scaled = ldexp(value, exponent);
  if (scaled == INFINITY) return 0x1.fffffffffffffp1023;
  return scaled < 0x1p-1021 && scaled > 0 ? scaled - 0x1p-1074 : scaled;
}

// A matrix in work: its state, vectors, and what its work items say of it.
struct SpectralWork {
  const SpectralEntry& e;
  SpectralState& state;
  double *basis, *next, *partial, *bound;
  double* statistics;  // 3 per item
  int64_t items;
  bool summed;  // whether products are in `next` already
};

// The unit start vector: seeded, or the given one with a little of the seeded, which leads out of an invariant subspace
// without the top singular vector.
__device__ inline void start_vector(const SpectralEntry& e, uint64_t seed, double* x, double* scratch) {
  double squares = 0, start_squares = 0;
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    const double value = random_value(seed, j);
    squares += value * value;
    if (e.start != nullptr) start_squares += e.start[j] * e.start[j];
  }
  const double size = sqrt(block_sum(squares, scratch)), start_size = sqrt(block_sum(start_squares, scratch));
  const bool warm = start_size > 0 && start_size < INFINITY;
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    const double value = random_value(seed, j) / size;
    x[j] = warm ? 1e-4 * value + e.start[j] / start_size : value;
  }
  const double length = norm(x, e.cols, scratch);
  for (int64_t j = thread(); j < e.cols; j += threads()) x[j] /= length;
}

// Scale, start vector and first state of a matrix. Returns whether there is anything to do.
__device__ inline bool begin(const SpectralLaunch& p, const SpectralWork& w, double* scratch) {
  const SpectralEntry& e = w.e;
  double largest = 0, bad = 0;
  for (int64_t i = thread(); i < w.items; i += threads()) {
    largest = larger(largest, w.statistics[3 * i]);
    bad += w.statistics[3 * i + 1] == 0;
  }
  largest = block_max(largest, scratch);
  const bool finite = block_sum(bad, scratch) == 0;
  const bool work = finite && largest > 0;
  start_vector(e, p.options.seed, w.basis, scratch);
  if (thread() == 0) {
    SpectralState& state = w.state;
    state.largest = largest;
    // Between the exponents, 2^e and its inverse are float64 numbers.
    const int exponent = finite && e.dtype == Dtype::kFloat64 ? binary_exponent(largest) : 0;
    state.exponent = exponent < -1000 ? -1000 : exponent > 1022 ? 1022 : exponent;
    state.scale = ldexp(1.0, -state.exponent);
    state.finite = finite;
    state.size = 0;
    state.passes = 0;
    state.check = e.start != nullptr ? 1 : 6;
    state.done = !work;
  }
  for (int64_t j = thread(); j < e.cols && !work; j += threads()) {
    p.out.right[e.right + j] = finite ? w.basis[j] : 0;
  }
  return work;
}

// w = W^T W v, from the items' partial sums, in order, unless it is there. Returns v . w.
__device__ inline double collect_product(const SpectralWork& w, const double* v, double* scratch) {
  double product = 0;
  for (int64_t j = thread(); j < w.e.cols; j += threads()) {
    double sum = w.summed ? w.next[j] : 0;
    for (int64_t i = 0; i < w.items && !w.summed; ++i) sum += w.partial[i * w.e.cols + j];
    if (!w.summed) w.next[j] = sum;
    product += v[j] * sum;
  }
  return block_sum(product, scratch);
}

// The published method: w becomes the next vector. Returns whether the matrix is done.
__device__ inline bool power_step(const SpectralLaunch& p, const SpectralWork& w, double* scratch) {
  const SpectralEntry& e = w.e;
  SpectralState& state = w.state;
  collect_product(w, w.basis, scratch);
  const double length = norm(w.next, e.cols, scratch);
  const int32_t passes = state.passes + 1;
  const bool done = passes >= p.options.max_passes || !(length > 0);
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    if (length > 0) w.basis[j] = w.next[j] / length;
    if (done) p.out.right[e.right + j] = w.basis[j];
  }
  __syncthreads();
  if (thread() == 0) {
    state.passes = passes;
    state.done = done;
  }
  return done;
}

// x = sum_i ritz_i basis_i, of unit norm, in the place of the first basis vector, and in `right` unless that is
// nullptr.
__device__ inline void ritz_vector(const SpectralEntry& e, double* basis, int size, double* right,
                                   LanczosShared& shared) {
  double squares = 0;
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += shared.ritz[i] * basis[i * e.cols + j];
    basis[j] = sum;
    squares += sum * sum;
  }
  const double length = sqrt(block_sum(squares, shared.scratch));
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    basis[j] /= length;
    if (right != nullptr) right[j] = basis[j];
  }
}

// Takes W^T W v of the current vector and extends the basis, restarts it, or ends. Returns whether the matrix is done.
__device__ inline bool lanczos_step(const SpectralLaunch& p, const SpectralWork& work, LanczosShared& shared) {
  const SpectralEntry& e = work.e;
  SpectralState& state = work.state;
  const int size = state.size, passes = state.passes + 1;
  int check = state.check;
  double *q = work.basis + size * e.cols, *w = work.next;
  const double alpha = collect_product(work, q, shared.scratch);
  const double beta = size > 0 ? state.off[size - 1] : 0;
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    w[j] -= alpha * q[j];
    if (size > 0) w[j] -= beta * q[j - e.cols];
  }
  const double next = orthogonalize(work.basis, size + 1, w, e.cols, shared);
  const bool full = size + 1 == e.basis, last = passes >= p.options.max_passes;
  const double first = size == 0 ? alpha : state.diagonal[0];
  bool done = false;
  if (full || last || size + 1 >= check || next <= 1e-14 * fabs(first)) {
    for (int64_t i = thread(); i <= size; i += threads()) {
      shared.diagonal[i] = i == size ? alpha : state.diagonal[i];
      shared.off[i] = i == size ? next : state.off[i];
    }
    __syncthreads();
    double error;
    const double value = ritz_value(shared, size + 1, next, &error);
    done = last || error <= p.options.tolerance * value || next <= 1e-14 * fabs(value) || !(value > 0);
    check = size + 1 + (e.start != nullptr && size < 8 ? 1 : error > 1e3 * p.options.tolerance * value ? 6 : 3);
  }
  if (done || full) {
    ritz_vector(e, work.basis, size + 1, done ? p.out.right + e.right : nullptr, shared);
    check = 6;
  } else {
    for (int64_t j = thread(); j < e.cols; j += threads()) q[e.cols + j] = w[j] / next;
  }
  // All threads have read the state before the last barrier.
  if (thread() == 0) {
    state.diagonal[size] = alpha;
    state.off[size] = next;
    state.size = done || full ? 0 : size + 1;
    state.passes = passes;
    state.check = check;
    state.done = done;
  }
  return done;
}

// Proved lower bound of the scaled norm from y = W x and bound = |W| |x|; y becomes a unit vector.
__device__ inline double certified_lower(const SpectralEntry& e, const double* x, double* y, const double* bound,
                                         double* scratch) {
  const double image = norm(y, e.rows, scratch), error = widened(norm(bound, e.rows, scratch));
  const double size = norm(x, e.cols, scratch);
  if (image > 0) {
    for (int64_t i = thread(); i < e.rows; i += threads()) y[i] /= image;
  }
  const double numerator = image * (1 - gamma(e.rows + 2)) - gamma(e.cols + 1) * error;
  return quotient_below(numerator, size, e.cols + 2);
}

// ||W||_2 <= min(sqrt(||W||_1 ||W||_inf), ||W||_F), of the scaled matrix, rounded up.
__device__ inline double holder_upper(const SpectralWork& w, double* scratch) {
  const SpectralEntry& e = w.e;
  double row = 0, column = 0, squares = 0;
  for (int64_t i = thread(); i < w.items; i += threads()) {
    row = larger(row, w.statistics[3 * i]);
    squares += w.statistics[3 * i + 1];
  }
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    double sum = 0;
    for (int64_t i = 0; i < w.items; ++i) sum += w.partial[i * e.cols + j];
    column = larger(column, sum);
  }
  row = block_max(row, scratch);
  column = block_max(column, scratch);
  squares = block_sum(squares, scratch);
  const double widen = 1 + gamma(e.rows * e.cols + 8);
  return up(widened(sqrt(smaller(squares, row * column) * widen + kTiny), 4));
}

// The results of a matrix, once its rows have been certified.
__device__ inline void finish(const SpectralLaunch& p, const SpectralWork& w, int32_t matrix, double* scratch) {
  const SpectralEntry& e = w.e;
  const SpectralState& state = w.state;
  double* left = p.out.left + e.left;
  const bool zero = state.finite != 0 && state.largest == 0;
  double lower = 0, upper = INFINITY;
  int64_t method = state.finite == 0 ? -1 : p.options.certify ? static_cast<int64_t>(UpperMethod::kHolder) : 0;
  if (state.finite != 0 && !zero) {
    const double value = certified_lower(e, p.out.right + e.right, left, w.bound, scratch);
    // The largest entry is a lower bound without any rounding.
    lower = larger(unscale_down(value, state.exponent), state.largest);
    if (p.options.certify) upper = unscale_up(holder_upper(w, scratch), state.exponent);
  } else {
    for (int64_t i = thread(); i < e.rows; i += threads()) left[i] = zero ? random_value(p.options.seed, i) : 0;
    const double length = norm(left, e.rows, scratch);
    for (int64_t i = thread(); i < e.rows && zero; i += threads()) left[i] /= length;
    if (zero && p.options.certify) {
      upper = 0;
      method = static_cast<int64_t>(UpperMethod::kCholesky);
    }
  }
  if (thread() == 0) {
    p.out.lower[matrix] = lower;
    p.out.upper[matrix] = upper;
    p.out.passes[matrix] = state.passes;
    p.out.upper_method[matrix] = method;
  }
}

}  // namespace lipfast::cuda

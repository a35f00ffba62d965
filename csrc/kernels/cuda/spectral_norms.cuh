// Body of spectral_norms; the contract is in spectral_norms.h.
#pragma once

#include "../rounding.h"
#include "lanczos.cuh"
#include "matrix.cuh"

namespace lipfast::cuda {

struct SpectralShared {
  LanczosShared lanczos;
  double y[kStagedRows];
  alignas(16) char stage[kStageBytes + 16];
};

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

// The parts of a matrix's workspace.
struct SpectralVectors {
  double *basis, *next, *partial, *bound;
  __device__ SpectralVectors(const SpectralLaunch& p, const SpectralEntry& e)
      : basis(p.vectors + e.vectors),
        next(basis + e.basis * e.cols),
        partial(next + e.cols),
        bound(partial + e.items * e.cols) {}
};

// Calls body(rows) with the rows of a work item as they are stored.
template <class Body>
__device__ void with_rows(const SpectralLaunch& p, int64_t item, const Body& body) {
  const SpectralEntry& e = p.entries[p.item_matrix[item]];
  const SpectralState& state = p.states[p.item_matrix[item]];
  const int64_t first = (item - e.first_item) * e.item_rows, count = smaller(e.item_rows, e.rows - first);
  const PowerOfTwo scaling{state.scale_first, state.scale_second};
  if (e.dtype == Dtype::kFloat32) {
    body(Rows<float>{static_cast<const float*>(e.data) + first * e.cols, count, e.cols, scaling}, first);
  } else {
    body(Rows<double>{static_cast<const double*>(e.data) + first * e.cols, count, e.cols, scaling}, first);
  }
}

__device__ inline void examine_item(const SpectralLaunch& p, int64_t item, SpectralShared& shared) {
  with_rows(p, item, [&](const auto& rows, int64_t) {
    double* statistics = p.item_statistics + 3 * item;
    examine(rows.data, rows.count * rows.cols, statistics, statistics + 1, shared.lanczos.scratch);
  });
}

__device__ inline void multiply_item(const SpectralLaunch& p, int64_t item, SpectralShared& shared) {
  const int32_t matrix = p.item_matrix[item];
  const SpectralEntry& e = p.entries[matrix];
  const SpectralVectors vectors(p, e);
  const double* v = vectors.basis + p.states[matrix].size * e.cols;
  with_rows(p, item, [&](const auto& rows, int64_t) {
    gram_product(rows, v, vectors.partial + (item - e.first_item) * e.cols, shared.y, shared.stage);
  });
}

__device__ inline void certify_item(const SpectralLaunch& p, int64_t item, SpectralShared& shared) {
  const SpectralEntry& e = p.entries[p.item_matrix[item]];
  const SpectralVectors vectors(p, e);
  with_rows(p, item, [&](const auto& rows, int64_t first) {
    double* statistics = p.item_statistics + 3 * item;
    certified_product(rows, p.out.right + e.right, p.out.left + e.left + first, vectors.bound + first,
                      vectors.partial + (item - e.first_item) * e.cols, statistics, statistics + 1,
                      shared.lanczos.scratch);
  });
}

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

// Puts a matrix on the lists of step `step`. By all threads, which have met at a barrier since they last used shared.y.
__device__ inline void enlist(const SpectralLaunch& p, int32_t matrix, int64_t step, SpectralShared& shared) {
  const SpectralEntry& e = p.entries[matrix];
  int32_t* counters = p.counters + step % 3 * 2;
  if (thread() == 0) {
    p.matrix_lists[step % 2 * p.count + atomicAdd(counters, 1)] = matrix;
    shared.y[0] = atomicAdd(counters + 1, static_cast<int32_t>(e.items));
  }
  __syncthreads();
  const auto first = static_cast<int64_t>(shared.y[0]);
  for (int64_t i = thread(); i < e.items; i += threads()) {
    p.item_lists[step % 2 * p.items + first + i] = static_cast<int32_t>(e.first_item + i);
  }
}

// Scale, start vector and first state of a matrix; on the lists of step 0 if there is anything to do.
__device__ inline void begin_matrix(const SpectralLaunch& p, int32_t matrix, SpectralShared& shared) {
  const SpectralEntry& e = p.entries[matrix];
  SpectralState& state = p.states[matrix];
  const SpectralVectors vectors(p, e);
  double largest = 0, bad = 0;
  for (int64_t i = thread(); i < e.items; i += threads()) {
    const double* statistics = p.item_statistics + 3 * (e.first_item + i);
    largest = larger(largest, statistics[0]);
    bad += statistics[1] == 0;
  }
  largest = block_max(largest, shared.lanczos.scratch);
  const bool finite = block_sum(bad, shared.lanczos.scratch) == 0;
  const bool work = finite && largest > 0;
  start_vector(e, p.options.seed, vectors.basis, shared.lanczos.scratch);
  if (thread() == 0) {
    state.largest = largest;
    state.exponent = finite ? binary_exponent(largest) : 0;
    const PowerOfTwo scaling = power_of_two(-state.exponent);
    state.scale_first = scaling.first;
    state.scale_second = scaling.second;
    state.finite = finite;
    state.size = 0;
    state.passes = 0;
    state.check = e.start != nullptr ? 1 : 6;
    state.done = !work;
  }
  if (work) return enlist(p, matrix, 0, shared);
  for (int64_t j = thread(); j < e.cols; j += threads()) p.out.right[e.right + j] = finite ? vectors.basis[j] : 0;
}

// w = W^T W v from the items' partial sums, in order. Returns v . w.
__device__ inline double collect_product(const SpectralEntry& e, const SpectralVectors& vectors, const double* v,
                                         double* scratch) {
  double product = 0;
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    double sum = 0;
    for (int64_t i = 0; i < e.items; ++i) sum += vectors.partial[i * e.cols + j];
    vectors.next[j] = sum;
    product += v[j] * sum;
  }
  return block_sum(product, scratch);
}

// The published method: w becomes the next vector. Returns whether the matrix is done.
__device__ inline bool power_step(const SpectralLaunch& p, int32_t matrix, SpectralShared& shared) {
  const SpectralEntry& e = p.entries[matrix];
  SpectralState& state = p.states[matrix];
  const SpectralVectors vectors(p, e);
  collect_product(e, vectors, vectors.basis, shared.lanczos.scratch);
  const double length = norm(vectors.next, e.cols, shared.lanczos.scratch);
  const int32_t passes = state.passes + 1;
  const bool done = passes >= p.options.max_passes || !(length > 0);
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    if (length > 0) vectors.basis[j] = vectors.next[j] / length;
    if (done) p.out.right[e.right + j] = vectors.basis[j];
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
__device__ inline bool lanczos_step(const SpectralLaunch& p, int32_t matrix, SpectralShared& all) {
  const SpectralEntry& e = p.entries[matrix];
  SpectralState& state = p.states[matrix];
  const SpectralVectors vectors(p, e);
  LanczosShared& shared = all.lanczos;
  const int size = state.size, passes = state.passes + 1;
  int check = state.check;
  double *q = vectors.basis + size * e.cols, *w = vectors.next;
  const double alpha = collect_product(e, vectors, q, shared.scratch);
  const double beta = size > 0 ? state.off[size - 1] : 0;
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    w[j] -= alpha * q[j];
    if (size > 0) w[j] -= beta * q[j - e.cols];
  }
  const double next = orthogonalize(vectors.basis, size + 1, w, e.cols, shared);
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
    ritz_vector(e, vectors.basis, size + 1, done ? p.out.right + e.right : nullptr, shared);
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
__device__ inline double holder_upper(const SpectralLaunch& p, const SpectralEntry& e, const double* column_sums,
                                      double* scratch) {
  double row = 0, column = 0, squares = 0;
  for (int64_t i = thread(); i < e.items; i += threads()) {
    row = larger(row, p.item_statistics[3 * (e.first_item + i)]);
    squares += p.item_statistics[3 * (e.first_item + i) + 1];
  }
  for (int64_t j = thread(); j < e.cols; j += threads()) {
    double sum = 0;
    for (int64_t i = 0; i < e.items; ++i) sum += column_sums[i * e.cols + j];
    column = larger(column, sum);
  }
  row = block_max(row, scratch);
  column = block_max(column, scratch);
  squares = block_sum(squares, scratch);
  const double widen = 1 + gamma(e.rows * e.cols + 8);
  return up(widened(sqrt(smaller(squares, row * column) * widen + kTiny), 4));
}

// The matrix's results, once certify_item has run on all its items.
__device__ inline void finish_matrix(const SpectralLaunch& p, int32_t matrix, SpectralShared& shared) {
  const SpectralEntry& e = p.entries[matrix];
  const SpectralState& state = p.states[matrix];
  const SpectralVectors vectors(p, e);
  double* scratch = shared.lanczos.scratch;
  double* left = p.out.left + e.left;
  const bool zero = state.finite != 0 && state.largest == 0;
  double lower = 0, upper = INFINITY;
  int64_t method = state.finite == 0 ? -1 : p.options.certify ? static_cast<int64_t>(UpperMethod::kHolder) : 0;
  if (state.finite != 0 && !zero) {
    const double value = certified_lower(e, p.out.right + e.right, left, vectors.bound, scratch);
    // The largest entry is a lower bound without any rounding.
    lower = larger(unscale_down(value, state.exponent), state.largest);
    if (p.options.certify) upper = unscale_up(holder_upper(p, e, vectors.partial, scratch), state.exponent);
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

// Products for every work item on the list, then the recurrence for every matrix on it, until the lists are empty.
__device__ inline void iterate(const SpectralLaunch& p, SpectralShared& shared) {
  for (int64_t step = 0;; ++step) {
    const int32_t* now = p.counters + step % 3 * 2;
    const int32_t matrices = now[0], items = now[1];
    if (matrices == 0) return;
    for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
      multiply_item(p, p.item_lists[step % 2 * p.items + i], shared);
    }
    grid_barrier();
    // Nobody reads these before the step after the next, which counts in them again.
    if (blockIdx.x == 0 && thread() < 2) p.counters[(step + 2) % 3 * 2 + thread()] = 0;
    for (int64_t i = blockIdx.x; i < matrices; i += gridDim.x) {
      const int32_t matrix = p.matrix_lists[step % 2 * p.count + i];
      const bool done = p.options.power ? power_step(p, matrix, shared) : lanczos_step(p, matrix, shared);
      if (!done) enlist(p, matrix, step + 1, shared);
    }
    grid_barrier();
  }
}

__global__ void spectral_table_kernel(const __grid_constant__ SpectralChunk chunk, int64_t first, int64_t count,
                                      const __grid_constant__ SpectralLaunch p) {
  for (int64_t i = thread(); i < count; i += threads()) {
    const_cast<SpectralEntry*>(p.entries)[first + i] = chunk.entries[i];
  }
  if (first == 0 && thread() < 6) p.counters[thread()] = 0;
}

// A cooperative launch of any number of blocks of whole warps. Dynamic shared memory: SpectralShared.
__global__ void __launch_bounds__(kSpectralThreads, 2) spectral_norms_kernel(const __grid_constant__ SpectralLaunch p) {
  LIPFAST_DYNAMIC_SHARED(memory);
  SpectralShared& shared = *reinterpret_cast<SpectralShared*>(memory);
  for (int64_t m = blockIdx.x; m < p.count; m += gridDim.x) {
    const SpectralEntry& e = p.entries[m];
    for (int64_t i = thread(); i < e.items; i += threads()) p.item_matrix[e.first_item + i] = static_cast<int32_t>(m);
  }
  grid_barrier();
  for (int64_t i = blockIdx.x; i < p.items; i += gridDim.x) examine_item(p, i, shared);
  grid_barrier();
  for (int64_t m = blockIdx.x; m < p.count; m += gridDim.x) begin_matrix(p, static_cast<int32_t>(m), shared);
  grid_barrier();
  iterate(p, shared);
  for (int64_t i = blockIdx.x; i < p.items; i += gridDim.x) certify_item(p, i, shared);
  grid_barrier();
  for (int64_t m = blockIdx.x; m < p.count; m += gridDim.x) finish_matrix(p, static_cast<int32_t>(m), shared);
}

}  // namespace lipfast::cuda

// Body of spectral_norms for matrices that the whole grid shares; the contract is in spectral_norms.h.
#pragma once

#include "spectral_steps.cuh"

namespace lipfast::cuda {

struct SpectralShared {
  LanczosShared lanczos;
  double y[kStagedRows];
  alignas(16) char stage[kStageBytes + 16];
};

__device__ inline SpectralWork work_of(const SpectralLaunch& p, int32_t matrix) {
  const SpectralEntry& e = p.entries[matrix];
  double* basis = p.vectors + e.vectors;
  double* next = basis + e.basis * e.cols;
  double* partial = next + e.cols;
  double* statistics = p.item_statistics + 3 * e.first_item;
  return {e, p.states[e.state], basis, next, partial, partial + e.items * e.cols, statistics, e.items, e.sums > 0};
}

// Calls body(rows, first) with the rows of a work item as they are stored.
template <class Body>
__device__ void with_rows(const SpectralLaunch& p, int64_t item, const Body& body) {
  const SpectralEntry& e = p.entries[p.item_matrix[item]];
  const int64_t first = (item - e.first_item) * e.item_rows, count = smaller(e.item_rows, e.rows - first);
  const double scale = p.states[e.state].scale;
  if (e.dtype == Dtype::kFloat32) {
    body(Rows<float>{static_cast<const float*>(e.data) + first * e.cols, count, e.cols, scale}, first);
  } else {
    body(Rows<double>{static_cast<const double*>(e.data) + first * e.cols, count, e.cols, scale}, first);
  }
}

__device__ inline void examine_item(const SpectralLaunch& p, int64_t item, SpectralShared& shared) {
  with_rows(p, item, [&](const auto& rows, int64_t) {
    double* statistics = p.item_statistics + 3 * item;
    examine(rows, statistics, statistics + 1, shared.lanczos.scratch);
  });
}

__device__ inline void multiply_item(const SpectralLaunch& p, int64_t item, SpectralShared& shared) {
  const SpectralWork work = work_of(p, p.item_matrix[item]);
  const double* v = work.basis + work.state.size * work.e.cols;
  with_rows(p, item, [&](const auto& rows, int64_t) {
    gram_product(rows, v, work.partial + (item - work.e.first_item) * work.e.cols, shared.y, shared.stage);
  });
}

// next[j] for kSumColumns columns of a matrix with many items: every warp adds some of them, the first all warps' sums.
__device__ inline void add_sums(const SpectralLaunch& p, int64_t sum, SpectralShared& shared) {
  const SpectralWork work = work_of(p, static_cast<int32_t>(sum >> 32));
  const int64_t cols = work.e.cols, j = (sum & 0xFFFFFFFF) * kSumColumns + lane();
  double* sums = reinterpret_cast<double*>(shared.stage);
  double own = 0;
  for (int64_t i = warp(); i < work.items && j < cols; i += warps()) own += work.partial[i * cols + j];
  sums[warp() * kWarp + lane()] = own;
  __syncthreads();
  if (warp() == 0 && j < cols) {
    double total = 0;
    for (int i = 0; i < warps(); ++i) total += sums[i * kWarp + lane()];
    work.next[j] = total;
  }
  __syncthreads();
}

__device__ inline void certify_item(const SpectralLaunch& p, int64_t item, SpectralShared& shared) {
  const SpectralWork work = work_of(p, p.item_matrix[item]);
  const SpectralEntry& e = work.e;
  with_rows(p, item, [&](const auto& rows, int64_t first) {
    double* statistics = p.item_statistics + 3 * item;
    certified_product(rows, p.out.right + e.right, p.out.left + e.left + first, work.bound + first,
                      work.partial + (item - e.first_item) * e.cols, statistics, statistics + 1,
                      shared.lanczos.scratch);
  });
}

// Puts a matrix on the lists of step `step`. By all threads, which have met at a barrier since they last used shared.y.
__device__ inline void enlist(const SpectralLaunch& p, int32_t matrix, int64_t step, SpectralShared& shared) {
  const SpectralEntry& e = p.entries[matrix];
  int32_t* counters = p.counters + step % 3 * 3;
  if (thread() == 0) {
    p.matrix_lists[step % 2 * p.count + atomicAdd(counters, 1)] = matrix;
    shared.y[0] = atomicAdd(counters + 1, static_cast<int32_t>(e.items));
    shared.y[1] = atomicAdd(counters + 2, e.sums);
  }
  __syncthreads();
  const auto first = static_cast<int64_t>(shared.y[0]), first_sum = static_cast<int64_t>(shared.y[1]);
  for (int64_t i = thread(); i < e.items; i += threads()) {
    p.item_lists[step % 2 * p.items + first + i] = static_cast<int32_t>(e.first_item + i);
  }
  for (int64_t i = thread(); i < e.sums; i += threads()) {
    p.sum_lists[step % 2 * p.sums + first_sum + i] = static_cast<int64_t>(matrix) << 32 | i;
  }
}

// Products for every work item on the list, sums of many, then the recurrence for every matrix on it, until the lists
// are empty.
__device__ inline void iterate(const SpectralLaunch& p, SpectralShared& shared) {
  for (int64_t step = 0;; ++step) {
    const int32_t* now = p.counters + step % 3 * 3;
    const int32_t matrices = now[0], items = now[1], sums = now[2];
    if (matrices == 0) return;
    for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
      multiply_item(p, p.item_lists[step % 2 * p.items + i], shared);
    }
    grid_barrier();
    if (sums > 0) {
      for (int64_t i = blockIdx.x; i < sums; i += gridDim.x) add_sums(p, p.sum_lists[step % 2 * p.sums + i], shared);
      grid_barrier();
    }
    // Nobody reads these before the step after the next, which counts in them again.
    if (blockIdx.x == 0 && thread() < 3) p.counters[(step + 2) % 3 * 3 + thread()] = 0;
    for (int64_t i = blockIdx.x; i < matrices; i += gridDim.x) {
      const int32_t matrix = p.matrix_lists[step % 2 * p.count + i];
      const SpectralWork work = work_of(p, matrix);
      const bool done =
          p.options.power ? power_step(p, work, shared.lanczos.scratch) : lanczos_step(p, work, shared.lanczos);
      if (!done) enlist(p, matrix, step + 1, shared);
    }
    grid_barrier();
  }
}

__global__ void spectral_table_kernel(const __grid_constant__ SpectralChunk chunk,
                                      const __grid_constant__ SpectralLaunch p) {
  const int64_t count = chunk.period * chunk.repeats;
  for (int64_t i = blockIdx.x * threads() + thread(); i < count; i += gridDim.x * threads()) {
    const_cast<SpectralEntry*>(p.entries)[chunk.first + i] = entry_of(chunk, i);
  }
  if (chunk.first > 0 || blockIdx.x > 0) return;
  if (thread() < 9) p.counters[thread()] = 0;
  if (thread() < 2) p.turns[thread()] = 0;
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
  // Matrices without items are others' business.
  for (int64_t m = blockIdx.x; m < p.count; m += gridDim.x) {
    const auto matrix = static_cast<int32_t>(m);
    if (p.entries[m].items == 0 || !begin(p, work_of(p, matrix), shared.lanczos.scratch)) continue;
    enlist(p, matrix, 0, shared);
  }
  grid_barrier();
  iterate(p, shared);
  for (int64_t i = blockIdx.x; i < p.items; i += gridDim.x) certify_item(p, i, shared);
  grid_barrier();
  for (int64_t m = blockIdx.x; m < p.count; m += gridDim.x) {
    const auto matrix = static_cast<int32_t>(m);
    if (p.entries[m].items > 0) finish(p, work_of(p, matrix), matrix, shared.lanczos.scratch);
  }
}

}  // namespace lipfast::cuda

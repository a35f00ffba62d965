// Body of spectral_norms for matrices that one block holds; the contract is in spectral_norms.h.
//
// The block's shared memory: ResidentShared, the next vector (cols), sums of half of the warps (cols each), as many
// rows of the matrix as fit, and the basis if it does; otherwise that is in the block's slot. A pass over the matrix
// converts every entry to float64 once: a warp holds whole rows in registers, forms y_i = w_i . v and adds y_i w_i to
// its part of z.
#pragma once

#include "spectral_steps.cuh"

namespace lipfast::cuda {

struct ResidentShared {
  LanczosShared lanczos;
  SpectralState state;
  double statistics[3];
  int64_t turn;
};

struct ResidentSize {
  int32_t size;    // 0: up to kSmallResidentBytes, 1: larger ones
  int64_t shared;  // bytes of dynamic shared memory
};

// sums[c] += sum over the rows i = first + warp kRows, ... of (w_i . v) w_ij, j = lane + 32 c; kRows rows at a time.
template <int kColumns, int kRows, class T>
__device__ inline void add_rows(const Rows<T>& w, const T* rows, int64_t count, const double* v,
                                double (&sums)[kColumns]) {
  for (int64_t first = warp() * kRows; first < count; first += warps() * kRows) {
    double entries[kRows][kColumns], y[kRows] = {};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t j = lane() + c * kWarp;
      const double x = j < w.cols ? v[j] : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool inside = j < w.cols && first + r < count;
        entries[r][c] = inside ? w.entry(rows[(first + r) * w.cols + j]) : 0;
        y[r] += entries[r][c] * x;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) y[r] = warp_sum(y[r]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[c] += y[r] * entries[r][c];
    }
  }
}

// z = W^T (W v) for up to 32 kColumns columns. folded: cols doubles per pair of warps. Warps of a block: a power of
// two. Ends with a barrier.
template <int kColumns, int kRows, class T>
__device__ inline void resident_product(const Rows<T>& w, const double* v, double* z, double* folded) {
  double sums[kColumns] = {};
  add_rows<kColumns, kRows>(w, w.tile, w.held, v, sums);
  add_rows<kColumns, kRows>(w, w.data + w.held * w.cols, w.count - w.held, v, sums);
  for (int half = warps() / 2; half > 0; half /= 2) {
    const bool gives = warp() >= half && warp() < 2 * half;
    for (int c = 0; c < kColumns && gives; ++c) {
      const int64_t j = lane() + c * kWarp;
      if (j < w.cols) folded[(warp() - half) * w.cols + j] = sums[c];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t j = lane() + c * kWarp;
      if (j < w.cols && warp() < half) sums[c] += folded[warp() * w.cols + j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t j = lane() + c * kWarp;
    if (j < w.cols && warp() == 0) z[j] = sums[c];
  }
  __syncthreads();
}

template <class T>
__device__ inline void multiply(const Rows<T>& w, const double* v, double* z, double* folded) {
  if (w.cols <= 2 * kWarp) {
    resident_product<2, 4>(w, v, z, folded);
  } else {
    static_assert(kResidentColumns <= 8 * kWarp);
    resident_product<8, 2>(w, v, z, folded);
  }
}

template <class T>
__device__ inline void solve(const SpectralLaunch& p, int32_t matrix, char* memory, int64_t shared_bytes) {
  ResidentShared& shared = *reinterpret_cast<ResidentShared*>(memory);
  const SpectralEntry& e = p.entries[matrix];
  double* next = reinterpret_cast<double*>(memory + round_up(sizeof(ResidentShared), 16));
  double* folded = next + e.cols;
  const int64_t vectors = round_up((1 + warps() / 2) * e.cols, 2);  // the arena is aligned to 16 bytes
  char* arena = reinterpret_cast<char*>(next + vectors);
  const int64_t room = shared_bytes - (arena - memory) - 16, row_bytes = e.cols * static_cast<int64_t>(sizeof(T));
  Rows<T> rows{static_cast<const T*>(e.data), e.rows, e.cols, 1.0};
  rows.held = smaller(e.rows, room / row_bytes);
  rows.tile = stage(rows.data, rows.held * e.cols, arena);
  const int64_t used = round_up(rows.held * row_bytes + 16, 16), basis_bytes = e.basis * e.cols * 8;
  double* slot = p.slots + blockIdx.x * p.slot_size;
  double* basis = used + basis_bytes <= room + 16 ? reinterpret_cast<double*>(arena + used) : slot;
  const SpectralWork work{e, shared.state, basis, next, next, slot + e.basis * e.cols, shared.statistics, 1, true};
  double* scratch = shared.lanczos.scratch;
  // The statistics of the only item are thread 0's alone.
  examine(rows, work.statistics, work.statistics + 1, scratch);
  bool done = !begin(p, work, scratch);
  __syncthreads();
  rows.scale = shared.state.scale;
  while (!done) {
    multiply(rows, work.basis + shared.state.size * e.cols, next, folded);
    done = p.options.power ? power_step(p, work, scratch) : lanczos_step(p, work, shared.lanczos);
    __syncthreads();
  }
  certified_product(rows, p.out.right + e.right, p.out.left + e.left, work.bound, work.partial, work.statistics,
                    work.statistics + 1, scratch);
  finish(p, work, matrix, scratch);
}

// Blocks of a power of two of warps, at most kResidentSlots of them.
__global__ void __launch_bounds__(kSpectralThreads, 1)
    spectral_resident_kernel(const __grid_constant__ SpectralLaunch p, ResidentSize which) {
  LIPFAST_DYNAMIC_SHARED(memory);
  ResidentShared& shared = *reinterpret_cast<ResidentShared*>(memory);
  for (;;) {
    if (thread() == 0) shared.turn = atomicAdd(p.turns + which.size, 1);
    __syncthreads();
    const int64_t m = shared.turn;
    if (m >= p.count) return;
    const SpectralEntry& e = p.entries[m];
    const int64_t bytes = e.rows * e.cols * (e.dtype == Dtype::kFloat32 ? 4 : 8);
    __syncthreads();  // all have read the turn: a matrix that is passed over has no other barrier
    if (e.items > 0 || (bytes > kSmallResidentBytes) != (which.size == 1)) continue;
    if (e.dtype == Dtype::kFloat32) {
      solve<float>(p, static_cast<int32_t>(m), memory, which.shared);
    } else {
      solve<double>(p, static_cast<int32_t>(m), memory, which.shared);
    }
  }
}

}  // namespace lipfast::cuda

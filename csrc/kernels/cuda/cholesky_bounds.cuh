// Bodies of cholesky_bounds; the contract is in cholesky_bounds.h.
#pragma once

#include "cholesky_bounds.h"
#include "factor_residual.cuh"

namespace lipfast::cuda {

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    residual_parts_kernel(const __grid_constant__ CholeskyBoundParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ResidualShared<double>*>(memory);
  const int64_t side = p.matrices.side;
  for (int64_t at = blockIdx.x; at < p.matrices.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const auto shifted = [&](int64_t i, int64_t j) { return i == j ? p.shifts[matrix] : 0; };
    const Scaled<T> b(p.matrices, matrix, p.scales[matrix]);
    const LowerTriangle<double> factor{p.factors + matrix * side * side, side};
    write_residual(shifted, b, factor, lower_tile(at % tiles, kResidualTile), shared, p.parts + 2 * at);
  }
}

// The next number; both double, as a float among them would make it the host's.
__device__ inline double next_above(double value) { return nextafter(value, static_cast<double>(INFINITY)); }

// A value >= 0 over a power of two, rounded up.
__device__ inline double unscaled_up(double value, double scale) {
  const double result = value / scale;  // exact, but for overflow and below the normal numbers
  return result < 0x1p-1021 ? next_above(result) : result;
}

__global__ void __launch_bounds__(kBoundThreads)
    cholesky_bounds_kernel(const __grid_constant__ CholeskyBoundParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  double* scratch = reinterpret_cast<double*>(memory);
  for (int64_t matrix = blockIdx.x; matrix < p.matrices.batch; matrix += gridDim.x) {
    const double* parts = p.parts + 2 * matrix * tiles;
    double squares = 0, trace = 0;
    for (int64_t tile = thread(); tile < tiles; tile += threads()) {
      squares += parts[2 * tile];
      trace += parts[2 * tile + 1];
    }
    squares = block_sum(squares, scratch);
    trace = block_sum(trace, scratch);
    if (thread() != 0) continue;
    const double residual = (sqrt(squares) + trace * p.rounding) * p.room;
    const double bound = next_above(p.shifts[matrix] + residual);
    const double root = unscaled_up(next_above(sqrt(bound)), p.scales[matrix]);
    p.upper[matrix] = p.failures[matrix] == 0 && root >= 0 ? root : INFINITY;
  }
}

}  // namespace lipfast::cuda

// Body of cholesky_residual; the contract is in cholesky_residual.h.
#pragma once

#include "cholesky_residual.h"
#include "device.cuh"

namespace lipfast::cuda {

constexpr int64_t kResidualDepth = 16;  // columns of B or L in shared memory at a time

struct ResidualShared {
  double scratch[kMaxWarps];
  double a[kResidualTile][kResidualDepth + 1], b[kResidualTile][kResidualDepth + 1];
};

// Two rows and two columns of a tile: what one thread sums.
struct ResidualSums {
  double at[2][2] = {};
};

// Rows of a row-major matrix from (row, column) on; zeros beyond `side` rows, `length` columns, and above the diagonal
// of a triangular one.
__device__ inline void load_tile(const double* from, int64_t side, int64_t length, bool triangular, int64_t row,
                                 int64_t column, double (*to)[kResidualDepth + 1]) {
  for (int64_t at = thread(); at < kResidualTile * kResidualDepth; at += threads()) {
    const int64_t i = row + at / kResidualDepth, j = column + at % kResidualDepth;
    const bool inside = i < side && j < length && (!triangular || j <= i);
    to[at / kResidualDepth][at % kResidualDepth] = inside ? from[i * length + j] : 0;
  }
}

// sums += the tile (row, column) of M M^T.
__device__ inline void add_products(const double* m, int64_t side, int64_t length, bool triangular, int64_t row,
                                    int64_t column, ResidualShared& shared, ResidualSums& sums) {
  const int64_t i = 2 * (thread() / (kResidualTile / 2)), j = 2 * (thread() % (kResidualTile / 2));
  const int64_t end = triangular ? smaller(length, column + kResidualTile) : length;
  for (int64_t k = 0; k < end; k += kResidualDepth) {
    load_tile(m, side, length, triangular, row, k, shared.a);
    load_tile(m, side, length, triangular, column, k, shared.b);
    __syncthreads();
    for (int64_t d = 0; d < kResidualDepth; ++d) {
      for (int r = 0; r < 2; ++r) {
        for (int c = 0; c < 2; ++c) sums.at[r][c] += shared.a[i + r][d] * shared.b[j + c][d];
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kResidualThreads) cholesky_residual_kernel(ResidualParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  ResidualShared& shared = *reinterpret_cast<ResidualShared*>(memory);
  for (int64_t at = blockIdx.x; at < p.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    int64_t tile = at % tiles, edge = 0;  // tile number edge (edge + 1) / 2 + position
    while (tile > edge) tile -= ++edge;
    const int64_t row = edge * kResidualTile, column = tile * kResidualTile;
    ResidualSums sums;
    add_products(p.matrices + matrix * p.side * p.length, p.side, p.length, false, row, column, shared, sums);
    add_products(p.factors + matrix * p.side * p.side, p.side, p.side, true, row, column, shared, sums);
    double squares = 0, trace = 0;
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 2; ++c) {
        const int64_t i = row + 2 * (thread() / (kResidualTile / 2)) + r;
        const int64_t j = column + 2 * (thread() % (kResidualTile / 2)) + c;
        if (i >= p.side || j >= p.side) continue;
        const double residual = (i == j ? p.shifts[matrix] : 0) - sums.at[r][c];
        squares += residual * residual;
        trace += i == j ? sums.at[r][c] : 0;
      }
    }
    squares = block_sum(squares, shared.scratch);
    trace = block_sum(trace, shared.scratch);
    if (thread() == 0) {
      p.out[2 * at] = row == column ? squares : 2 * squares;
      p.out[2 * at + 1] = trace;
    }
  }
}

}  // namespace lipfast::cuda

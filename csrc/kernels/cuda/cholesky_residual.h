// clang-format off
// cholesky_residual on CUDA: how far t I - B B^T is from L L^T, for the certificate of an upper bound.
//
// Types        float64.
// Result       per tile of R = fl(t I - B B^T - L L^T): the sum of squares of its entries (mirrored tiles counted
//              twice) and, of tiles on the diagonal, the part of ||B||_F^2 + ||L||_F^2 in it. Only the lower triangle
//              of L is read.
// Error        every entry is a sum of at most s + l products and t, in plain float64 with round-to-nearest: an error
//              of at most gamma_{s+l+1} times the sum of magnitudes. No library takes part, so none has to be trusted.
// Determinism  fixed order of every sum.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast::cuda {

constexpr int64_t kResidualTile = 32;
constexpr int64_t kResidualThreads = 256;

struct ResidualParams {
  const double* matrices;  // (batch, side, length)
  const double* factors;   // (batch, side, side)
  const double* shifts;    // (batch)
  int64_t batch, side, length;
  double* out;  // (batch, tiles, 2)
};

// Tiles of the lower triangle.
inline int64_t residual_tiles(int64_t side) {
  const int64_t edge = (side + kResidualTile - 1) / kResidualTile;
  return edge * (edge + 1) / 2;
}

// Queues the kernel on `stream` (a cudaStream_t).
void launch_cholesky_residual_cuda(const ResidualParams& params, void* stream);

}  // namespace lipfast::cuda

// clang-format off
// hermitian_residual on CUDA: how far A is from B B^* + L L^*, for the certificate of a symbol's norm.
//
// Types        complex numbers of two float64, aligned to 16 bytes.
// Result       per tile of R = fl(A - B B^* - L L^*): the sum of squares of its entries (each below the diagonal counted twice)
//              and, of tiles on the diagonal, the part of ||B||_F^2 + ||L||_F^2 in it. Of A and L only the lower
//              triangles are read, and of A's diagonal the real part; B may have no columns.
// Error        every real and imaginary part is a sum of at most 2 (n + m) products, in plain float64 with
//              round-to-nearest, subtracted from A's. No library takes part, so none has to be trusted.
// Determinism  fixed order of every sum.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "tiles.h"

namespace lipfast::cuda {

struct HermitianResidualParams {
  const double* hermitian;  // (batch, side, side, 2)
  const double* matrices;   // (batch, side, length, 2)
  const double* factors;    // (batch, side, side, 2)
  int64_t batch, side, length;
  double* out;  // (batch, residual_tiles(side), 2)
};

// Queues the kernel on `stream` (a cudaStream_t).
void launch_hermitian_residual_cuda(const HermitianResidualParams& params, void* stream);

}  // namespace lipfast::cuda

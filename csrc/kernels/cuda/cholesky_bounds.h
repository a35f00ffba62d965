// clang-format off
// cholesky_bounds on CUDA: upper bounds of ||W|| from t, 2^-e and any factors L of t I - B B^T, B = 2^-e W.
//
// Types        float32 or float64 entries; everything else in float64.
// Result       2^e sqrt(t + ||R||_F + its rounding), R = t I - B B^T - L L^T, rounded up; +inf where the factorisation
//              failed or a number is NaN. Only the lower triangle of L is read.
// Error        every entry of R is a sum of at most s + l products and t, in plain float64 with round-to-nearest: an error
//              of at most gamma_{s+l+1} times the sum of magnitudes, and all of them at most that times
//              ||B||_F^2 + ||L||_F^2, which is the trace of what was summed. `rounding` covers that, and the trace's own.
//              `room` covers the sum of squares, its root, and the sum with t; one step upwards what it is rounded by.
//              docs/bounds.md has the proof. No library takes part, so none has to be trusted.
// Determinism  fixed order of every sum.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "tiles.h"
#include "wide_matrices.h"

namespace lipfast::cuda {

constexpr int64_t kBoundThreads = 128;

struct CholeskyBoundParams {
  WideMatrices matrices;
  const double* factors;          // (batch, side, side)
  const int32_t* failures;        // (batch)
  const double *scales, *shifts;  // (batch)
  double rounding, room;
  double* parts;  // (batch, residual_tiles(side), 2)
  double* upper;  // (batch)
};

// Queues two kernels on `stream` (a cudaStream_t).
void launch_cholesky_bounds_cuda(const CholeskyBoundParams& params, void* stream);

}  // namespace lipfast::cuda

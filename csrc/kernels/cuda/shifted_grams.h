// clang-format off
// shifted_grams on CUDA: t I - B B^T of many matrices of one shape, for factorisations that prove upper bounds.
//
// Types        float32 or float64 entries, sums in float64.
// Result       B = 2^-e W with e the exponent of a lower bound of the norm, between -1000 and 1022; t = the scaled
//              bound's square times 1 + excess, at least 2^-150; both triangles. Also 2^-e and t, which the proof takes
//              as they are.
// Error        none is claimed: what is made of the result is checked by cholesky_bounds.
// Determinism  fixed order of every sum.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "wide_matrices.h"

namespace lipfast::cuda {

constexpr int kLeastGramExponent = -1000, kLargestGramExponent = 1022;

struct ShiftedGramParams {
  WideMatrices matrices;
  const double* lower;  // (batch)
  double excess;
  double* grams;            // (batch, side, side)
  double *scales, *shifts;  // (batch)
};

// Queues the kernel on `stream` (a cudaStream_t).
void launch_shifted_grams_cuda(const ShiftedGramParams& params, void* stream);

}  // namespace lipfast::cuda

// clang-format off
// jacobian_reduction on CUDA: ||J_b||_2 and ||J_b||_F for B dense Jacobians J_b of K x D without an SVD: several to a
// warp, or a warp each, where the smaller side is at most 32, a block each beyond.
//
// Types        float32 or float64 in and out; the Gram matrix of the smaller side in float64, after an exact scaling by
//              a power of two where squares could overflow.
// Error        relative (D + K^2) u of float64 plus one rounding to the output type.
// Not certified: a value of a derivative is not yet a lower bound of a Lipschitz constant.
// Memory       sides up to 32: registers and a few KB of shared memory; up to 64: shared memory; beyond, a Gram matrix per resident block.
// Errors       of values none: NaN or Inf in a Jacobian gives NaN for that Jacobian. Of launches: launch.cuh.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast::cuda {

// Doubles of workspace for one resident block, and how many blocks to give a workspace.
struct ReductionPlan {
  int64_t blocks, workspace;
};
ReductionPlan plan_jacobian_reduction_cuda(const JacobianReductionParams& params);

// Queues the kernel on `stream` (a cudaStream_t). workspace: blocks * workspace doubles.
void launch_jacobian_reduction_cuda(const JacobianReductionParams& params, const ReductionPlan& plan, double* workspace,
                                    void* stream);

}  // namespace lipfast::cuda

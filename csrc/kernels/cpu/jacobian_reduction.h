// clang-format off
// jacobian_reduction: ||J_b||_2 and ||J_b||_F for B dense Jacobians J_b of K x D, without an SVD.
//
// Types        float32 or float64 in and out; the Gram matrix of the smaller side is accumulated in float64 after an
//              exact scaling by a power of two, so nothing overflows.
// Error        min(K, D) <= 64: relative (D + K^2) u of float64 plus one rounding to the output type. Larger:
//              Lanczos, stopped at an estimated relative error of 5e-7 (float32), 5e-14 (float64).
// Not certified: a value of a derivative is not yet a lower bound of a Lipschitz constant.
// Errors       none: NaN or Inf in a Jacobian gives NaN for that Jacobian.
// Threads      a range of Jacobians per call; ranges starting at multiples of 8 give the same values however the
//              batch is cut.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast {

using JacobianReductionKernel = void (*)(const JacobianReductionParams&, int64_t begin, int64_t end, double* workspace);

constexpr int64_t kReductionTile = 8;  // a multiple of every capability's number of lanes

JacobianReductionKernel jacobian_reduction_kernel(Dtype dtype);
int64_t jacobian_reduction_workspace(int64_t outputs, int64_t inputs);

}  // namespace lipfast

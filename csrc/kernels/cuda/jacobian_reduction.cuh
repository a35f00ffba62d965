// Body of jacobian_reduction; the contract is in jacobian_reduction.h.
#pragma once

#include "jacobian_reduction.h"
#include "reduce.cuh"

namespace lipfast::cuda {

// Blocks take every gridDim.x-th Jacobian. workspace: ReduceLayout::global() doubles per block. Dynamic shared memory:
// ReduceLayout::shared() doubles.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    jacobian_reduction_kernel(JacobianReductionParams p, double* workspace) {
  LIPFAST_DYNAMIC_SHARED(shared);
  const ReduceLayout layout(p.outputs, p.inputs);
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const JacobianView<T> view{static_cast<const T*>(p.jacobian) + b * p.outputs * p.inputs, p.outputs, p.inputs,
                               p.inputs, 1};
    double spectral, frobenius;
    reduce_jacobian(view, reinterpret_cast<double*>(shared), workspace + blockIdx.x * layout.global(), &spectral,
                    &frobenius);
    if (thread() == 0) {
      static_cast<T*>(p.spectral)[b] = static_cast<T>(spectral);
      static_cast<T*>(p.frobenius)[b] = static_cast<T>(frobenius);
    }
  }
}

}  // namespace lipfast::cuda

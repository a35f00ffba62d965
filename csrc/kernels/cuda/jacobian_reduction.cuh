// Bodies of jacobian_reduction; the contract is in jacobian_reduction.h.
#pragma once

#include "jacobian_reduction.h"
#include "warp_reduce.cuh"

namespace lipfast::cuda {

constexpr int kWarpReduceThreads = 128;

template <class T>
__device__ JacobianView<T> jacobian_of(const JacobianReductionParams& p, int64_t b) {
  return {static_cast<const T*>(p.jacobian) + b * p.outputs * p.inputs, p.outputs, p.inputs, p.inputs, 1};
}

template <class T>
__device__ void store_norms(const JacobianReductionParams& p, int64_t b, double spectral, double frobenius) {
  static_cast<T*>(p.spectral)[b] = static_cast<T>(spectral);
  static_cast<T*>(p.frobenius)[b] = static_cast<T>(frobenius);
}

// Blocks take every gridDim.x-th Jacobian. workspace: ReduceLayout::global() doubles per block. Dynamic shared memory:
// ReduceLayout::shared() doubles.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    jacobian_reduction_kernel(JacobianReductionParams p, double* workspace) {
  LIPFAST_DYNAMIC_SHARED(shared);
  const ReduceLayout layout(p.outputs, p.inputs);
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    double spectral, frobenius;
    reduce_jacobian(jacobian_of<T>(p, b), reinterpret_cast<double*>(shared), workspace + blockIdx.x * layout.global(),
                    &spectral, &frobenius);
    if (thread() == 0) store_norms<T>(p, b, spectral, frobenius);
  }
}

// Each warp takes Group::kCount Jacobians at a time; the smaller side is at most kWidth. Dynamic shared memory:
// Group::kDoubles for each group of the block.
template <class T, int kWidth>
__global__ void __launch_bounds__(kWarpReduceThreads, kWidth <= 10   ? 4
                                                      : kWidth <= 16 ? 3
                                                                     : 2)
    jacobian_reduction_warp_kernel(JacobianReductionParams p) {
  LIPFAST_DYNAMIC_SHARED(shared);
  using G = Group<kWidth>;
  double* memory = reinterpret_cast<double*>(shared) + (warp() * G::kCount + G::index()) * G::kDoubles;
  const int64_t taken = int64_t{G::kCount} * gridDim.x * warps();
  for (int64_t first = (int64_t{blockIdx.x} * warps() + warp()) * G::kCount; first < p.batch; first += taken) {
    const int64_t b = first + G::index();
    const bool given = b < p.batch;
    double spectral, frobenius;
    reduce_in_warp<kWidth, 54, 4>(jacobian_of<T>(p, given ? b : first), given, memory, &spectral, &frobenius);
    if (given && G::row() == 0) store_norms<T>(p, b, spectral, frobenius);
  }
}

}  // namespace lipfast::cuda

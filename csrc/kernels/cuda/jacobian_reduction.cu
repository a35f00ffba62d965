#include "jacobian_reduction.cuh"
#include "launch.cuh"

namespace lipfast::cuda {
namespace {

// Of workspace in all; a Gram matrix per block beyond it would leave no room for the caller's data.
constexpr int64_t kWorkspaceBytes = int64_t{1} << 30;

const void* kernel_for(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? reinterpret_cast<const void*>(&jacobian_reduction_kernel<float>)
                                  : reinterpret_cast<const void*>(&jacobian_reduction_kernel<double>);
}

}  // namespace

ReductionPlan plan_jacobian_reduction_cuda(const JacobianReductionParams& p) {
  const ReduceLayout layout(p.outputs, p.inputs);
  int64_t blocks = 0;
  const cudaError_t error =
      resident_blocks(kernel_for(p.dtype), static_cast<int>(layout.block()), 8 * layout.shared(), &blocks);
  if (layout.global() > 0) blocks = std::min(blocks, std::max<int64_t>(1, kWorkspaceBytes / (8 * layout.global())));
  return {std::min(blocks, p.batch), layout.global(), error};
}

int launch_jacobian_reduction_cuda(const JacobianReductionParams& p, const ReductionPlan& plan, double* workspace,
                                   void* stream) {
  if (p.batch == 0) return cudaSuccess;
  const ReduceLayout layout(p.outputs, p.inputs);
  const auto grid = static_cast<unsigned>(plan.blocks), block = static_cast<unsigned>(layout.block());
  const size_t shared = 8 * layout.shared();
  const auto queue = static_cast<cudaStream_t>(stream);
  if (p.dtype == Dtype::kFloat32) {
    jacobian_reduction_kernel<float><<<grid, block, shared, queue>>>(p, workspace);
  } else {
    jacobian_reduction_kernel<double><<<grid, block, shared, queue>>>(p, workspace);
  }
  return cudaGetLastError();
}

}  // namespace lipfast::cuda

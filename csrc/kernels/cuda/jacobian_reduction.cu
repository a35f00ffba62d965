#include "jacobian_reduction.cuh"
#include "launch.cuh"

namespace lipfast::cuda {
namespace {

constexpr char kOp[] = "jacobian_reduction";
// Of workspace in all; a Gram matrix per block beyond it would leave no room for the caller's data.
constexpr int64_t kWorkspaceBytes = int64_t{1} << 30;

using Kernel = void (*)(JacobianReductionParams, double*);

Kernel kernel_for(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? &jacobian_reduction_kernel<float> : &jacobian_reduction_kernel<double>;
}

}  // namespace

ReductionPlan plan_jacobian_reduction_cuda(const JacobianReductionParams& p) {
  const ReduceLayout layout(p.outputs, p.inputs);
  int64_t blocks = resident_blocks(kOp, kernel_for(p.dtype), {0, layout.block(), 8 * layout.shared()});
  if (layout.global() > 0) blocks = std::min(blocks, std::max<int64_t>(1, kWorkspaceBytes / (8 * layout.global())));
  return {std::min(blocks, p.batch), layout.global()};
}

void launch_jacobian_reduction_cuda(const JacobianReductionParams& p, const ReductionPlan& plan, double* workspace,
                                    void* stream) {
  const ReduceLayout layout(p.outputs, p.inputs);
  launch(kOp, kernel_for(p.dtype), {plan.blocks, layout.block(), 8 * layout.shared()}, stream, p, workspace);
}

}  // namespace lipfast::cuda

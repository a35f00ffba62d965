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

// The kernel whose warps take Jacobians of their own, its block, and how many a block takes at a time.
struct WarpKernel {
  void (*kernel)(JacobianReductionParams);
  Grid grid;
  int64_t at_once;
};

template <int kWidth>
WarpKernel warp_kernel_of(Dtype dtype) {
  const int64_t groups = kWarpReduceThreads / Group<kWidth>::kLanes;
  return {dtype == Dtype::kFloat32 ? &jacobian_reduction_warp_kernel<float, kWidth>
                                   : &jacobian_reduction_warp_kernel<double, kWidth>,
          {0, kWarpReduceThreads, 8 * groups * Group<kWidth>::kDoubles},
          groups};
}

WarpKernel warp_kernel_for(const JacobianReductionParams& p) {
  const int64_t side = smaller(p.outputs, p.inputs);
  return side <= 4    ? warp_kernel_of<4>(p.dtype)
         : side <= 10 ? warp_kernel_of<10>(p.dtype)
         : side <= 16 ? warp_kernel_of<16>(p.dtype)
                      : warp_kernel_of<32>(p.dtype);
}

}  // namespace

ReductionPlan plan_jacobian_reduction_cuda(const JacobianReductionParams& p) {
  const ReduceLayout layout(p.outputs, p.inputs);
  if (layout.side <= kWarpSide) {
    const WarpKernel warps = warp_kernel_for(p);
    const int64_t wanted = (p.batch + warps.at_once - 1) / warps.at_once;
    return {std::min(wanted, resident_blocks(kOp, warps.kernel, warps.grid)), 0};
  }
  int64_t blocks = resident_blocks(kOp, kernel_for(p.dtype), {0, layout.block(), 8 * layout.shared()});
  if (layout.global() > 0) blocks = std::min(blocks, std::max<int64_t>(1, kWorkspaceBytes / (8 * layout.global())));
  return {std::min(blocks, p.batch), layout.global()};
}

void launch_jacobian_reduction_cuda(const JacobianReductionParams& p, const ReductionPlan& plan, double* workspace,
                                    void* stream) {
  const ReduceLayout layout(p.outputs, p.inputs);
  if (layout.side <= kWarpSide) {
    WarpKernel warps = warp_kernel_for(p);
    warps.grid.blocks = plan.blocks;
    return launch(kOp, warps.kernel, warps.grid, stream, p);
  }
  launch(kOp, kernel_for(p.dtype), {plan.blocks, layout.block(), 8 * layout.shared()}, stream, p, workspace);
}

}  // namespace lipfast::cuda

#include "../../kernels/cuda/jacobian_reduction.h"

#include <tuple>

#include "device.h"

namespace lipfast {
namespace {

std::tuple<Tensor, Tensor> jacobian_reduction_cuda(Tensor jacobian) {
  const Dtype dtype = check_jacobian_reduction(jacobian);
  const DeviceGuard guard(jacobian.get_device_index());
  const int64_t batch = jacobian.size(0);
  Tensor spectral = torch::stable::new_empty(jacobian, {batch});
  Tensor frobenius = torch::stable::new_empty(jacobian, {batch});
  if (batch == 0) return {spectral, frobenius};
  const JacobianReductionParams params{
      jacobian.data_ptr(), dtype, batch, jacobian.size(1), jacobian.size(2), spectral.data_ptr(), frobenius.data_ptr()};
  const cuda::ReductionPlan plan = cuda::plan_jacobian_reduction_cuda(params);
  Tensor workspace = bytes_like(jacobian, 8 * plan.blocks * plan.workspace);
  cuda::launch_jacobian_reduction_cuda(params, plan, mutable_values<double>(workspace), current_stream(jacobian));
  return {spectral, frobenius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("jacobian_reduction", TORCH_BOX(&jacobian_reduction_cuda)); }

}  // namespace lipfast

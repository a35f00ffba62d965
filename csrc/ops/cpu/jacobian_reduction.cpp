#include "../../kernels/cpu/jacobian_reduction.h"

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "threads.h"

namespace lipfast {
namespace {

std::tuple<Tensor, Tensor> jacobian_reduction_cpu(Tensor jacobian) {
  const Dtype dtype = check_jacobian_reduction(jacobian);
  const int64_t batch = jacobian.size(0), outputs = jacobian.size(1), inputs = jacobian.size(2);
  Tensor spectral = torch::stable::new_empty(jacobian, {batch});
  Tensor frobenius = torch::stable::new_empty(jacobian, {batch});
  const JacobianReductionParams params{jacobian.data_ptr(), dtype, batch, outputs, inputs, spectral.data_ptr(),
                                       frobenius.data_ptr()};
  const JacobianReductionKernel kernel = jacobian_reduction_kernel(dtype);
  for_each_item(
      (batch + kReductionTile - 1) / kReductionTile,
      [&] { return Workspace(jacobian_reduction_workspace(outputs, inputs) * static_cast<int64_t>(sizeof(double))); },
      [&](int64_t tile, const Workspace& workspace) {
        const int64_t begin = tile * kReductionTile;
        kernel(params, begin, std::min(batch, begin + kReductionTile), workspace.as<double>());
      });
  return {spectral, frobenius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) { m.impl("jacobian_reduction", TORCH_BOX(&jacobian_reduction_cpu)); }

}  // namespace lipfast

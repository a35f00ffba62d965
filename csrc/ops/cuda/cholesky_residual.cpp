#include "../../kernels/cuda/cholesky_residual.h"

#include "device.h"

namespace lipfast {
namespace {

Tensor cholesky_residual_cuda(Tensor matrices, Tensor factors, Tensor shifts) {
  check_cholesky_residual(matrices, factors, shifts);
  check_device(factors, matrices, "cholesky_residual: factors");
  check_device(shifts, matrices, "cholesky_residual: shifts");
  const DeviceGuard guard(matrices.get_device_index());
  const int64_t batch = matrices.size(0), side = matrices.size(1);
  Tensor out = torch::stable::new_empty(matrices, {batch, cuda::residual_tiles(side), 2});
  const cuda::ResidualParams params{
      values<double>(matrices), values<double>(factors),    values<double>(shifts), batch, side,
      matrices.size(2),         mutable_values<double>(out)};
  cuda::launch_cholesky_residual_cuda(params, current_stream(matrices));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("cholesky_residual", TORCH_BOX(&cholesky_residual_cuda)); }

}  // namespace lipfast

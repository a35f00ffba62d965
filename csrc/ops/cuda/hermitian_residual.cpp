#include "../../kernels/cuda/hermitian_residual.h"

#include "device.h"

namespace lipfast {
namespace {

Tensor hermitian_residual_cuda(Tensor hermitian, Tensor matrices, Tensor factors) {
  check_hermitian_residual(hermitian, matrices, factors);
  check_device(matrices, hermitian, "hermitian_residual: matrices");
  check_device(factors, hermitian, "hermitian_residual: factors");
  const DeviceGuard guard(hermitian.get_device_index());
  const int64_t batch = hermitian.size(0), side = hermitian.size(1);
  Tensor out = torch::stable::new_empty(hermitian, {batch, cuda::residual_tiles(side), 2});
  const cuda::HermitianResidualParams params{
      values<double>(hermitian), values<double>(matrices),   values<double>(factors), batch, side,
      matrices.size(2),          mutable_values<double>(out)};
  cuda::launch_hermitian_residual_cuda(params, current_stream(hermitian));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("hermitian_residual", TORCH_BOX(&hermitian_residual_cuda)); }

}  // namespace lipfast

#include "../../kernels/cuda/cholesky_bounds.h"

#include "device.h"
#include "wide_matrices.h"

namespace lipfast {
namespace {

Tensor cholesky_bounds_cuda(Tensor matrices, Tensor factors, Tensor failures, Tensor scales, Tensor shifts,
                            double rounding, double room) {
  check_cholesky_bounds(matrices, factors, failures, scales, shifts);
  check_device(factors, matrices, "cholesky_bounds: factors");
  check_device(failures, matrices, "cholesky_bounds: failures");
  check_device(scales, matrices, "cholesky_bounds: scales");
  check_device(shifts, matrices, "cholesky_bounds: shifts");
  const DeviceGuard guard(matrices.get_device_index());
  const int64_t batch = matrices.size(0);
  Tensor parts = torch::stable::new_empty(scales, {batch, cuda::residual_tiles(matrices.size(1)), 2});
  Tensor upper = torch::stable::new_empty(scales, {batch});
  const cuda::CholeskyBoundParams params{wide_matrices(matrices),
                                         values<double>(factors),
                                         values<int32_t>(failures),
                                         values<double>(scales),
                                         values<double>(shifts),
                                         rounding,
                                         room,
                                         mutable_values<double>(parts),
                                         mutable_values<double>(upper)};
  cuda::launch_cholesky_bounds_cuda(params, current_stream(matrices));
  return upper;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("cholesky_bounds", TORCH_BOX(&cholesky_bounds_cuda)); }

}  // namespace lipfast

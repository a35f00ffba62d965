#include "../../kernels/cuda/tap_products.h"

#include "device.h"

namespace lipfast {
namespace {

Tensor tap_products_cuda(Tensor taps, std::vector<int64_t> axes) {
  check_tap_products(taps, axes);
  const DeviceGuard guard(taps.get_device_index());
  const cuda::TapAxes sizes{{axes[0], axes[1], axes[2]}};
  const int64_t symbols = taps.size(0), rows = taps.size(2);
  Tensor out = torch::stable::new_empty(taps, {symbols, sizes.differences(), rows, rows});
  cuda::launch_tap_products_cuda(
      {values<double>(taps), symbols, rows, taps.size(3), sizes, mutable_values<double>(out)}, current_stream(taps));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("tap_products", TORCH_BOX(&tap_products_cuda)); }

}  // namespace lipfast

#include "../../kernels/cuda/symbol_grams.h"

#include "device.h"

namespace lipfast {
namespace {

Tensor symbol_grams_cuda(Tensor products, std::vector<int64_t> axes, Tensor symbols, Tensor centres,
                         std::vector<int64_t> periods, Tensor shifts) {
  check_symbol_grams(products, axes, symbols, centres, periods, shifts);
  check_device(symbols, products, "symbol_grams: symbols");
  check_device(centres, products, "symbol_grams: centres");
  check_device(shifts, products, "symbol_grams: shifts");
  const DeviceGuard guard(products.get_device_index());
  const int64_t count = symbols.size(0), rows = products.size(2);
  Tensor out = torch::stable::new_empty(products, {count, rows, rows, 2});
  cuda::launch_symbol_grams_cuda({values<double>(products),
                                  values<int64_t>(symbols),
                                  values<int64_t>(centres),
                                  values<double>(shifts),
                                  count,
                                  rows,
                                  {{axes[0], axes[1], axes[2]}},
                                  {periods[0], periods[1], periods[2]},
                                  mutable_values<double>(out)},
                                 current_stream(products));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("symbol_grams", TORCH_BOX(&symbol_grams_cuda)); }

}  // namespace lipfast

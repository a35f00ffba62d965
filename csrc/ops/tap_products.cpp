// tap_products: products R_j = sum_k W_{k+j} W_k^T of the taps of convolutions. Schema and argument checks.
#include "checks.h"

namespace lipfast {

void check_tap_products(const Tensor& taps, const std::vector<int64_t>& axes) {
  STD_TORCH_CHECK(check_dense(taps, 4, "tap_products: taps") == Dtype::kFloat64,
                  "tap_products: taps: expected float64");
  check_tap_axes(axes, "tap_products");
  STD_TORCH_CHECK(taps.size(1) == axes[0] * axes[1] * axes[2], "tap_products: taps: expected ",
                  axes[0] * axes[1] * axes[2], " taps, got ", taps.size(1));
  STD_TORCH_CHECK(taps.size(2) > 0 && taps.size(3) > 0, "tap_products: taps: are empty");
}

// taps: (symbols, taps, rows, cols); axes: taps per axis, three. Returns (symbols, differences, rows, rows).
LIPFAST_SCHEMA("tap_products(Tensor taps, int[] axes) -> Tensor")

}  // namespace lipfast

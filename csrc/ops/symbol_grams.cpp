// symbol_grams: t I - G(theta) for Gram matrices of convolutions' symbols. Schema and argument checks.
#include "checks.h"

namespace lipfast {
namespace {

void check_indices(const Tensor& tensor, int64_t dimensions, const std::string& what) {
  STD_TORCH_CHECK(tensor.dim() == dimensions && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long,
                  what, ": expected a contiguous int64 tensor of ", dimensions, " dimensions");
}

}  // namespace

void check_symbol_grams(const Tensor& products, const std::vector<int64_t>& axes, const Tensor& symbols,
                        const Tensor& centres, const std::vector<int64_t>& periods, const Tensor& shifts) {
  STD_TORCH_CHECK(check_dense(products, 4, "symbol_grams: products") == Dtype::kFloat64 &&
                      check_dense(shifts, 1, "symbol_grams: shifts") == Dtype::kFloat64,
                  "symbol_grams: expected float64");
  check_tap_axes(axes, "symbol_grams");
  const int64_t count = ((2 * axes[0] - 1) * (2 * axes[1] - 1) * (2 * axes[2] - 1) + 1) / 2;
  STD_TORCH_CHECK(products.size(1) == count && products.size(2) == products.size(3) && products.size(2) > 0,
                  "symbol_grams: products: expected ", count, " square matrices per symbol, got ", text(products));
  check_indices(symbols, 1, "symbol_grams: symbols");
  check_indices(centres, 2, "symbol_grams: centres");
  STD_TORCH_CHECK(centres.size(1) == 3 && centres.size(0) == symbols.size(0) && shifts.size(0) == symbols.size(0),
                  "symbol_grams: expected ", symbols.size(0), " centres of three numbers, and as many shifts");
  STD_TORCH_CHECK(periods.size() == 3, "symbol_grams: expected three periods");
  for (const int64_t period : periods) {
    STD_TORCH_CHECK(period > 0 && period <= int64_t{1} << 40, "symbol_grams: expected periods of at most 2^40");
  }
}

// symbols: (count), which of the products; centres: (count, 3), frequencies times periods. Neither is looked at on the
// host. Returns (count, rows, rows, 2).
LIPFAST_SCHEMA(
    "symbol_grams(Tensor products, int[] axes, Tensor symbols, Tensor centres, int[] periods, Tensor shifts) -> Tensor")

}  // namespace lipfast

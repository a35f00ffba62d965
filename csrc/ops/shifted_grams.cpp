// shifted_grams: t I - B B^T of scaled matrices B, whose Cholesky factors prove upper bounds. Schema and argument
// checks.
#include "checks.h"

namespace lipfast {

Dtype check_wide(const Tensor& matrices, const std::string& op) {
  const ScalarType type = matrices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": matrices: expected float32 or float64");
  STD_TORCH_CHECK(matrices.dim() == 3, op, ": matrices: expected 3 dimensions, got ", matrices.dim());
  STD_TORCH_CHECK(matrices.size(1) > 0 && matrices.size(2) > 0, op, ": matrices: are empty");
  return dtype_of(matrices);
}

void check_shifted_grams(const Tensor& matrices, const Tensor& lower) {
  check_wide(matrices, "shifted_grams");
  STD_TORCH_CHECK(check_dense(lower, 1, "shifted_grams: lower") == Dtype::kFloat64, "shifted_grams: expected float64");
  STD_TORCH_CHECK(lower.size(0) == matrices.size(0), "shifted_grams: lower: expected ", matrices.size(0), " values");
}

// matrices: (n, s, l) of any strides. lower: near their norms.
// grams: (n, s, s); scales, shifts: (n).
LIPFAST_SCHEMA(
    "shifted_grams(Tensor matrices, Tensor lower, float excess) -> (Tensor grams, Tensor scales, Tensor shifts)")

}  // namespace lipfast

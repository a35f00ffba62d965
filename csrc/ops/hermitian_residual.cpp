// hermitian_residual: how far A is from B B^* + L L^*. Schema and argument checks. Complex numbers are pairs of
// float64.
#include "checks.h"

namespace lipfast {

void check_hermitian_residual(const Tensor& hermitian, const Tensor& matrices, const Tensor& factors) {
  const Tensor* given[] = {&hermitian, &matrices, &factors};
  const char* names[] = {"hermitian", "matrices", "factors"};
  for (int i = 0; i < 3; ++i) {
    const std::string name = std::string("hermitian_residual: ") + names[i];
    STD_TORCH_CHECK(check_dense(*given[i], 4, name) == Dtype::kFloat64 && given[i]->size(3) == 2, name,
                    ": expected pairs of float64");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(given[i]->data_ptr()) % 16 == 0, name,
                    ": expected values aligned to 16 bytes");
  }
  const int64_t batch = hermitian.size(0), side = hermitian.size(1);
  STD_TORCH_CHECK(side > 0 && hermitian.size(2) == side, "hermitian_residual: hermitian: expected square matrices");
  STD_TORCH_CHECK(matrices.size(0) == batch && matrices.size(1) == side, "hermitian_residual: matrices: expected ",
                  batch, " with ", side, " rows");
  STD_TORCH_CHECK(factors.size(0) == batch && factors.size(1) == side && factors.size(2) == side,
                  "hermitian_residual: factors: expected ", batch, " x ", side, " x ", side);
}

// (batch, tiles, 2): sums of squares of A - B B^* - L L^*, and parts of ||B||_F^2 + ||L||_F^2.
LIPFAST_SCHEMA("hermitian_residual(Tensor hermitian, Tensor matrices, Tensor factors) -> Tensor")

}  // namespace lipfast

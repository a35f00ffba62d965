// cholesky_residual: how far t I - B B^T is from L L^T. Schema and argument checks.
#include "checks.h"

namespace lipfast {

void check_cholesky_residual(const Tensor& matrices, const Tensor& factors, const Tensor& shifts) {
  STD_TORCH_CHECK(check_dense(matrices, 3, "cholesky_residual: matrices") == Dtype::kFloat64 &&
                      check_dense(factors, 3, "cholesky_residual: factors") == Dtype::kFloat64 &&
                      check_dense(shifts, 1, "cholesky_residual: shifts") == Dtype::kFloat64,
                  "cholesky_residual: expected float64");
  const int64_t batch = matrices.size(0), side = matrices.size(1);
  STD_TORCH_CHECK(side > 0 && matrices.size(2) > 0, "cholesky_residual: matrices: are empty");
  STD_TORCH_CHECK(factors.size(0) == batch && factors.size(1) == side && factors.size(2) == side,
                  "cholesky_residual: factors: expected ", batch, " x ", side, " x ", side);
  STD_TORCH_CHECK(shifts.size(0) == batch, "cholesky_residual: shifts: expected ", batch, " values");
}

// (batch, tiles, 2): sums of squares of t I - B B^T - L L^T, and parts of ||B||_F^2 + ||L||_F^2.
LIPFAST_SCHEMA("cholesky_residual(Tensor matrices, Tensor factors, Tensor shifts) -> Tensor")

}  // namespace lipfast

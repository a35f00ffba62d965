// cholesky_bounds: upper bounds of norms from Cholesky factors of any library. Schema and argument checks.
#include "checks.h"

namespace lipfast {

void check_cholesky_bounds(const Tensor& matrices, const Tensor& factors, const Tensor& failures, const Tensor& scales,
                           const Tensor& shifts) {
  check_wide(matrices, "cholesky_bounds");
  const int64_t batch = matrices.size(0), side = matrices.size(1);
  STD_TORCH_CHECK(check_dense(factors, 3, "cholesky_bounds: factors") == Dtype::kFloat64 &&
                      check_dense(scales, 1, "cholesky_bounds: scales") == Dtype::kFloat64 &&
                      check_dense(shifts, 1, "cholesky_bounds: shifts") == Dtype::kFloat64,
                  "cholesky_bounds: expected float64");
  STD_TORCH_CHECK(factors.size(0) == batch && factors.size(1) == side && factors.size(2) == side,
                  "cholesky_bounds: factors: expected ", batch, " x ", side, " x ", side);
  STD_TORCH_CHECK(failures.dim() == 1 && failures.is_contiguous() && failures.scalar_type() == ScalarType::Int,
                  "cholesky_bounds: failures: expected int32");
  STD_TORCH_CHECK(scales.size(0) == batch && shifts.size(0) == batch && failures.size(0) == batch,
                  "cholesky_bounds: expected ", batch, " scales, shifts and failures");
}

// matrices: (n, s, l) of any strides; factors: (n, s, s), of which the lower triangles count; failures: of the
// factorisations, 0 for none; rounding: what an entry of the residual is off by, relative to the sum of magnitudes;
// room: what the sums of squares and the result are off by.
LIPFAST_SCHEMA(
    "cholesky_bounds(Tensor matrices, Tensor factors, Tensor failures, Tensor scales, Tensor shifts, float rounding, "
    "float room) -> Tensor")

}  // namespace lipfast

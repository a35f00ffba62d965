// jacobian_reduction: spectral and Frobenius norms of a batch of Jacobians. Schema and argument checks.
#include "checks.h"

namespace lipfast {

Dtype check_jacobian_reduction(const Tensor& jacobian) {
  const Dtype dtype = check_dense(jacobian, 3, "jacobian_reduction: jacobian");
  STD_TORCH_CHECK(jacobian.size(1) > 0 && jacobian.size(2) > 0, "jacobian_reduction: Jacobians of ", jacobian.size(1),
                  " x ", jacobian.size(2), " are empty");
  return dtype;
}

LIPFAST_SCHEMA("jacobian_reduction(Tensor jacobian) -> (Tensor spectral, Tensor frobenius)")

}  // namespace lipfast

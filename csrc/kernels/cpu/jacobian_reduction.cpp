#include "jacobian_reduction.h"

#include "capability.h"

#define LIPFAST_BODY "jacobian_reduction-inl.h"
#include "isa.h"

namespace lipfast {

JacobianReductionKernel jacobian_reduction_kernel() {
  static constexpr JacobianReductionKernel table[kCapabilities] = LIPFAST_TABLE(jacobian_reduction);
  return dispatch(table);
}

int64_t jacobian_reduction_workspace(int64_t outputs, int64_t inputs) {
  static constexpr int64_t (*table[kCapabilities])(int64_t, int64_t) = LIPFAST_TABLE(reduce_size);
  return dispatch(table)(outputs, inputs);
}

}  // namespace lipfast

#include "jacobian_reduction.h"

#define LIPFAST_BODY "jacobian_reduction-inl.h"
#include "isa.h"

namespace lipfast {

JacobianReductionKernel jacobian_reduction_kernel(Dtype dtype) { return LIPFAST_DISPATCH(reduction_kernel)(dtype); }

int64_t jacobian_reduction_workspace(int64_t outputs, int64_t inputs) {
  return LIPFAST_DISPATCH(reduce_size)(outputs, inputs);
}

}  // namespace lipfast

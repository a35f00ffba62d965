#include "chain_interval_jacobian.h"

#define LIPFAST_BODY "chain_interval_jacobian-inl.h"
#include "isa.h"

namespace lipfast {

ChainIntervalJacobianKernel chain_interval_jacobian_kernel() { return LIPFAST_DISPATCH(interval_jacobian_kernel)(); }

}  // namespace lipfast

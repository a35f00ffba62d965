#include "chain_jacobian_norms.h"

#define LIPFAST_BODY "chain_jacobian_norms-inl.h"
#include "isa.h"

namespace lipfast {

ChainKernel chain_jacobian_norms_kernel(Dtype dtype) { return LIPFAST_DISPATCH(chain_kernel)(dtype); }

}  // namespace lipfast

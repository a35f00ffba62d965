#include "chain_secants.h"

#define LIPFAST_BODY "chain_secants-inl.h"
#include "isa.h"

namespace lipfast {

ChainSecantsKernel chain_secants_kernel(Dtype dtype) { return LIPFAST_DISPATCH(secants_kernel)(dtype); }

}  // namespace lipfast

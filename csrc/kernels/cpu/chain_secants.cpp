#include "chain_secants.h"

#include <cfloat>

#include "capability.h"

#define LIPFAST_BODY "chain_secants-inl.h"
#include "isa.h"

namespace lipfast {

ChainSecantsKernel chain_secants_kernel() {
  static constexpr decltype(ChainSecantsKernel::workspace) sizes[kCapabilities] = LIPFAST_TABLE(secant_workspace);
  static constexpr decltype(ChainSecantsKernel::jacobian) jacobians[kCapabilities] = LIPFAST_TABLE(secant_jacobian);
  static constexpr decltype(ChainSecantsKernel::kinks) kinks[kCapabilities] = LIPFAST_TABLE(secant_kinks);
  static constexpr decltype(ChainSecantsKernel::enclose) enclosures[kCapabilities] = LIPFAST_TABLE(secant_enclose);
  return {dispatch(sizes), dispatch(jacobians), dispatch(kinks), dispatch(enclosures)};
}

}  // namespace lipfast

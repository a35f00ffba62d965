#include "chain_jacobian_norms.h"

#include "capability.h"

#define LIPFAST_BODY "chain_jacobian_norms-inl.h"
#include "isa.h"

namespace lipfast {

ChainKernel chain_jacobian_norms_kernel() {
  static constexpr decltype(ChainKernel::tiling) tilings[kCapabilities] = LIPFAST_TABLE(chain_tiling);
  static constexpr decltype(ChainKernel::pack) packs[kCapabilities] = LIPFAST_TABLE(chain_pack);
  static constexpr decltype(ChainKernel::tile) tiles[kCapabilities] = LIPFAST_TABLE(chain_tile);
  return {dispatch(tilings), dispatch(packs), dispatch(tiles)};
}

}  // namespace lipfast

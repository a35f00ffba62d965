// chain_jacobian_norms: per-sample norms of the Jacobian of a chain of affine maps and piecewise linear activations,
//
//   J(x) = D_L W_L D_{L-1} W_{L-1} ... D_1 W_1,   D_l = diag(1 where z_l > 0, slope_l elsewhere),
//
// fused: forward pass, derivatives, the product from the output side and the reduction for a tile of samples at a
// time. Nothing of size B x K x n is written; rows of units with derivative zero are skipped.
//
// Types        float32 or float64 for x, weights, products and results; the reduction accumulates in float64.
// Error        that of a forward pass and of L products in the type: about n eps elementwise. Where rounding flips
//              the sign of z_l the Jacobian of the neighbouring linear region is taken.
// Not certified: see certificate.py for the lower bound that is.
// Errors       none: NaN gives NaN for that sample.
// Threads      one tile of samples of one network is one thread's; the partition is fixed, so results do not depend
//              on the number of threads.
#pragma once

#include "../params.h"

namespace lipfast {

// How one call is cut: packed weights per network (elements of the dtype), samples per tile, bytes per thread.
struct ChainLayout {
  int64_t packed;
  int64_t tile;
  int64_t workspace;
};

struct ChainKernel {
  ChainLayout (*layout)(const ChainParams&);
  // Packs the weights of one network into column panels that the tiles then share.
  void (*pack)(const ChainParams&, int64_t network, void* packed);
  void (*tile)(const ChainParams&, int64_t network, const void* packed, int64_t first, int64_t count, void* workspace);
};

ChainKernel chain_jacobian_norms_kernel();

}  // namespace lipfast

// clang-format off
// chain_jacobian_norms: per-sample norms of the Jacobian of a chain of stages,
//
//   J(x) = J_S ... J_1,   J_s: the matrix of a linear stage, a convolution or an average pool; the diagonal of an
//                         activation's derivatives; the 0-1 matrix of a max pool's choice,
//
// fused: forward pass, derivatives, the product from the output side and the reduction for a tile of samples at a
// time. Nothing of size B x K x n is written; units with derivative zero, or that a max pool passes over, are skipped.
//
// Types        float32 or float64 for x, weights, products and results; the reduction accumulates in float64.
// Error        that of a forward pass and of S products in the type: about n eps elementwise; activations and their
//              derivatives to a few eps, where they decay like e^-t to a few (1 + t) eps. Where rounding carries a
//              unit over a kink, or changes a maximum, the Jacobian of the neighbouring linear region is taken.
// Sharing      samples whose activation patterns resemble one another share terms (chain_patterns-inl.h), so that in
//              the last digits a result depends on which samples there are, never on how many networks or threads.
// Conventions  autograd's: derivative 0 at both ends of a clipped range (so relu'(0) = 0), slope or alpha at 0 for
//              LeakyReLU and ELU, the first of equal maxima.
// Not certified: lower bounds of Lipschitz constants that are come from chain_secants.
// Errors       none: NaN in an output gives NaN for that sample.
// Threads      one tile of samples of one network is one thread's; the partition is fixed, so results do not depend
//              on the number of threads.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast {

// How one call is cut.
struct ChainTiling {
  int64_t packed;          // elements of the dtype, per network
  int64_t pack_workspace;  // bytes while one network is packed
  int64_t tile;            // samples
  bool shares;             // samples of a tile share terms: the more the closer they lie together
  int64_t workspace;       // bytes while a tile is computed
};

struct ChainKernel {
  ChainTiling (*tiling)(const ChainParams&);
  // Packs the weights of one network into column panels that the tiles then share.
  void (*pack)(const ChainParams&, int64_t network, void* packed, double* workspace, const Parallel* parallel);
  // The samples of one tile, by their indices.
  void (*tile)(const ChainParams&, int64_t network, const void* packed, const int64_t* samples, int64_t count,
               void* workspace);
};

// For this type of x, weights and results.
ChainKernel chain_jacobian_norms_kernel(Dtype dtype);

}  // namespace lipfast

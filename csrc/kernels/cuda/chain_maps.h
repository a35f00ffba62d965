// Where the weights, or the biases, of chains of one shape lie, as kernel arguments hold it.
#pragma once

#include "../params.h"

namespace lipfast::cuda {

constexpr int kMaxChainMaps = 128;  // networks times layers that are listed one by one

// Listed: network by network, nullptr for a bias that is not there. Spaced: those of the first network, and from the
// middle of the table on the steps to the next network's in bytes, so that one launch takes any number of networks.
struct ChainMaps {
  const void* at[kMaxChainMaps];
  bool spaced;

  LIPFAST_HOST_DEVICE const void* of(int64_t network, int layers, int layer) const {
    if (!spaced) return at[network * layers + layer];
    const auto first = reinterpret_cast<uintptr_t>(at[layer]);
    return reinterpret_cast<const void*>(first + network * reinterpret_cast<uintptr_t>(at[kMaxChainMaps / 2 + layer]));
  }
};

}  // namespace lipfast::cuda

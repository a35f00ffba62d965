// The kernels' random generator: splitmix64 (Steele, Lea, Flood 2014). Value number i of a stream depends on the seed
// and on i alone, so it is the same on every device, for every thread count and position in a list.
#pragma once

#include <cstdint>

#include "params.h"

namespace lipfast {

// What the state grows by: from seed + i kRandomStep on comes value number i.
constexpr uint64_t kRandomStep = 0x9e3779b97f4a7c15u;

// The next 53 random bits of a stream; `state` begins as its seed.
LIPFAST_SHARED int64_t random_bits(uint64_t& state) {
  uint64_t z = (state += kRandomStep);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<int64_t>((z ^ (z >> 31)) >> 11);
}

// The same, uniform in (-1, 1).
LIPFAST_SHARED double random_value(uint64_t& state) {
  return static_cast<double>(random_bits(state)) * 0x1p-52 - 1.0 + 0x1p-53;
}

}  // namespace lipfast

// Sizes of a convolution's taps, and the frequencies of its symbol What(theta) = sum_k W_k e^{i k.theta}.
#pragma once

#include "../rounding.h"

namespace lipfast {

// One group: sizes[0] x sizes[1] x sizes[2] matrices of rows x cols, dense and row-major, one after another.
struct TapShape {
  int64_t rows, cols;
  int64_t sizes[3];
  LIPFAST_SHARED int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
};

// Frequencies of p[a] / denominators[a] cycles on axis a.
struct FrequencyLattice {
  int64_t axes;
  int64_t denominators[3];
};

constexpr int64_t kCycle = int64_t{1} << 40;         // the denominator of frequencies on no grid of their own
constexpr double kPhaseError = 64 * kUnitRoundoff;   // of e^{i j.theta} as the kernels compute it
constexpr double kRootOfTwo = 0x1.6a09e667f3bcdp+0;  // above the root

}  // namespace lipfast

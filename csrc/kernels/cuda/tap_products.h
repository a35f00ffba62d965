// clang-format off
// tap_products on CUDA: R_j = sum_k W_{k+j} W_k^T of the taps W_k of convolutions, of which the Gram matrices of their
// symbols are made: G(theta) = R_0 + sum_j (e^{i j.theta} R_j + e^{-i j.theta} R_j^T).
//
// Types        float64.
// Result       (symbols, differences, rows, rows); j in the order of `difference`: zero first, then those whose first
//              number that is not zero is positive.
// Error        every entry is a sum of at most taps x cols products in plain float64 with round-to-nearest.
// Determinism  fixed order of every sum.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast::cuda {

struct TapOffset {
  int64_t at[3];
};

// A kernel's taps per axis.
struct TapAxes {
  int64_t sizes[3];

  LIPFAST_HOST_DEVICE int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
  LIPFAST_HOST_DEVICE int64_t differences() const {
    return ((2 * sizes[0] - 1) * (2 * sizes[1] - 1) * (2 * sizes[2] - 1) + 1) / 2;
  }
  LIPFAST_HOST_DEVICE TapOffset difference(int64_t index) const {
    const int64_t b = 2 * sizes[1] - 1, c = 2 * sizes[2] - 1, at = index + differences() - 1;
    return {{at / (b * c) - sizes[0] + 1, at / c % b - sizes[1] + 1, at % c - sizes[2] + 1}};
  }
};

struct TapProductsParams {
  const double* taps;  // (symbols, taps, rows, cols)
  int64_t symbols, rows, cols;
  TapAxes axes;
  double* out;  // (symbols, differences, rows, rows)
};

// Queues the kernel on `stream` (a cudaStream_t).
void launch_tap_products_cuda(const TapProductsParams& params, void* stream);

}  // namespace lipfast::cuda

// clang-format off
// symbol_grams on CUDA: t I - G(theta) for the Gram matrices G of convolutions' symbols, from tap_products.h's R_j.
//
// Types        float64; complex numbers are two; indices and frequencies int64.
// Result       (count, rows, rows, 2), Hermitian: the lower triangle is computed, the upper one is its mirror image.
// Error        beside those of the R_j and of the phases, every real and imaginary part of G is a sum of one and at most
//              2 (differences - 1) products with a sum or difference of two entries, in plain float64; on the diagonal
//              one more subtraction. Phases are off by less than 64 u: integers modulo a period, at most three
//              quotients and two sums, and the device's sincospi, which is within two units in the last place.
// Determinism  fixed order of every sum.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "tap_products.h"

namespace lipfast::cuda {

struct SymbolGramsParams {
  const double* products;  // (symbols, differences, rows, rows)
  const int64_t* symbols;  // (count)
  const int64_t* centres;  // (count, 3), frequencies times their periods, below 2^40
  const double* shifts;    // (count)
  int64_t count, rows;
  TapAxes axes;
  int64_t periods[3];
  double* out;  // (count, rows, rows, 2)
};

// Queues the kernel on `stream` (a cudaStream_t).
void launch_symbol_grams_cuda(const SymbolGramsParams& params, void* stream);

}  // namespace lipfast::cuda

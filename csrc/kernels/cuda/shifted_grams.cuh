// Body of shifted_grams; the contract is in shifted_grams.h.
#pragma once

#include "gram_tiles.cuh"
#include "shifted_grams.h"

namespace lipfast::cuda {

// One of the matrices, scaled.
template <class T>
__device__ inline GramScaled<T> scaled_matrix(const WideMatrices& m, int64_t matrix, double scale) {
  return {static_cast<const T*>(m.data) + matrix * m.step, m.row_step, m.column_step, scale};
}

template <class T>
__global__ void __launch_bounds__(kGramThreads)
    shifted_grams_kernel(const __grid_constant__ ShiftedGramParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  GramShared& shared = *reinterpret_cast<GramShared*>(memory);
  const int64_t side = p.matrices.side;
  for (int64_t at = blockIdx.x; at < p.matrices.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const GramPlace place(at % tiles);
    const double lower = p.lower[matrix];
    int exponent = binary_exponent(lower);
    exponent = exponent < kLeastGramExponent ? kLeastGramExponent : exponent;
    exponent = exponent > kLargestGramExponent ? kLargestGramExponent : exponent;
    const double scale = ldexp(1.0, -exponent);
    const double shift = larger(lower * scale * (lower * scale) * (1 + p.excess), 0x1p-150);
    GramSums sums;
    const auto b = scaled_matrix<T>(p.matrices, matrix, scale);
    add_gram_products(b, side, p.matrices.length, place.row, place.column, shared, sums);
    double* gram = p.grams + matrix * side * side;
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 2; ++c) {
        const int64_t i = place.row_of(r), j = place.column_of(c);
        if (i >= side || j > i) continue;
        const double value = (i == j ? shift : 0) - sums.at[r][c];
        gram[i * side + j] = value;
        if (i > j) gram[j * side + i] = value;
      }
    }
    if (at % tiles == 0 && thread() == 0) {
      p.scales[matrix] = scale;
      p.shifts[matrix] = shift;
    }
  }
}

}  // namespace lipfast::cuda

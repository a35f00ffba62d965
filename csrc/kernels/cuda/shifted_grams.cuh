// Body of shifted_grams; the contract is in shifted_grams.h.
#pragma once

#include "shifted_grams.h"
#include "tile_products.cuh"

namespace lipfast::cuda {

constexpr int kGramEach = 2;  // rows and columns of a tile that are a thread's
constexpr int64_t kGramTile = kTileAcross * kGramEach;

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    shifted_grams_kernel(const __grid_constant__ ShiftedGramParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto& panels = *reinterpret_cast<TilePanels<double, kGramEach>*>(memory);
  const int64_t side = p.matrices.side;
  for (int64_t at = blockIdx.x; at < p.matrices.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const double lower = p.lower[matrix];
    int exponent = binary_exponent(lower);
    exponent = exponent < kLeastGramExponent ? kLeastGramExponent : exponent;
    exponent = exponent > kLargestGramExponent ? kLargestGramExponent : exponent;
    const double scale = ldexp(1.0, -exponent);
    const double shift = larger(lower * scale * (lower * scale) * (1 + p.excess), 0x1p-150);
    const TilePlace place = lower_tile(at % tiles, kGramTile);
    const Scaled<T> b(p.matrices, matrix, scale);
    TileSums<double, kGramEach> sums;
    add_products(b, b, side, place, panels, sums);
    double* gram = p.grams + matrix * side * side;
    for (int r = 0; r < kGramEach; ++r) {
      for (int c = 0; c < kGramEach; ++c) {
        const int64_t i = place.row + sums.row(r), j = place.column + sums.column(c);
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

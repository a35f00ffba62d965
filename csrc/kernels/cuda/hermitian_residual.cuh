// Body of hermitian_residual; the contract is in hermitian_residual.h.
#pragma once

#include "hermitian_residual.h"
#include "tile_products.cuh"

namespace lipfast::cuda {

struct HermitianShared {
  double scratch[kMaxWarps];
  TilePanels<Complex, 2> panels;
};

__global__ void __launch_bounds__(kTileThreads) hermitian_residual_kernel(HermitianResidualParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  HermitianShared& shared = *reinterpret_cast<HermitianShared*>(memory);
  for (int64_t at = blockIdx.x; at < p.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const TilePlace place = lower_tile(at % tiles, kHermitianTile);
    const auto* a = reinterpret_cast<const Complex*>(p.hermitian) + matrix * p.side * p.side;
    const auto* b = reinterpret_cast<const Complex*>(p.matrices) + matrix * p.side * p.length;
    const auto* factor = reinterpret_cast<const Complex*>(p.factors) + matrix * p.side * p.side;
    TileSums<Complex, 2> sums;
    add_products(b, b, p.side, p.length, false, place, shared.panels, sums);
    add_products(factor, factor, p.side, p.side, true, place, shared.panels, sums);
    double squares = 0, trace = 0;
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 2; ++c) {
        const int64_t i = place.row + sums.row(r), j = place.column + sums.column(c);
        if (i >= p.side || j > i) continue;
        const Complex sum = sums.at[r][c], entry = a[i * p.side + j];
        const double re = entry.re - sum.re, im = i == j ? 0 : entry.im - sum.im;
        squares += (i == j ? 1 : 2) * (re * re + im * im);
        trace += i == j ? sum.re : 0;
      }
    }
    squares = block_sum(squares, shared.scratch);
    trace = block_sum(trace, shared.scratch);
    if (thread() == 0) {
      p.out[2 * at] = squares;
      p.out[2 * at + 1] = trace;
    }
  }
}

}  // namespace lipfast::cuda

// Body of cholesky_residual; the contract is in cholesky_residual.h.
#pragma once

#include "cholesky_residual.h"
#include "gram_tiles.cuh"

namespace lipfast::cuda {

__global__ void __launch_bounds__(kGramThreads) cholesky_residual_kernel(ResidualParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  GramShared& shared = *reinterpret_cast<GramShared*>(memory);
  for (int64_t at = blockIdx.x; at < p.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const GramPlace place(at % tiles);
    GramSums sums;
    const GramRows b{p.matrices + matrix * p.side * p.length, p.length, false};
    const GramRows l{p.factors + matrix * p.side * p.side, p.side, true};
    add_products(b, p.side, p.length, place.row, place.column, shared, sums);
    add_products(l, p.side, smaller(p.side, place.column + kGramTile), place.row, place.column, shared, sums);
    write_residual(place, sums, p.side, p.shifts[matrix], shared, p.out + 2 * at);
  }
}

}  // namespace lipfast::cuda

// Body of cholesky_residual; the contract is in cholesky_residual.h.
#pragma once

#include "cholesky_residual.h"
#include "gram_tiles.cuh"

namespace lipfast::cuda {

__global__ void __launch_bounds__(kGramThreads, 8) cholesky_residual_kernel(ResidualParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  GramShared& shared = *reinterpret_cast<GramShared*>(memory);
  for (int64_t at = blockIdx.x; at < p.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const GramPlace place(at % tiles);
    GramSums sums;
    // One after the other in one loop: the products are in the code once, which leaves registers for more blocks.
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const GramRows m = part == 0 ? GramRows{p.matrices + matrix * p.side * p.length, p.length, false}
                                   : GramRows{p.factors + matrix * p.side * p.side, p.side, true};
      const int64_t end = part == 0 ? p.length : smaller(p.side, place.column + kGramTile);
      add_products(m, p.side, end, place.row, place.column, shared, sums);
    }
    write_residual(place, sums, p.side, p.shifts[matrix], shared, p.out + 2 * at);
  }
}

}  // namespace lipfast::cuda

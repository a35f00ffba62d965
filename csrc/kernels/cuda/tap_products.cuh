// Body of tap_products; the contract is in tap_products.h.
#pragma once

#include "tap_products.h"
#include "tile_products.cuh"

namespace lipfast::cuda {

// The tap at k + j, or -1 where there is none.
__device__ inline int64_t moved_tap(const TapAxes& axes, int64_t k, const TapOffset& j) {
  const int64_t at[3] = {k / axes.sizes[2] / axes.sizes[1], k / axes.sizes[2] % axes.sizes[1], k % axes.sizes[2]};
  int64_t moved = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t place = at[axis] + j.at[axis];
    if (place < 0 || place >= axes.sizes[axis]) return -1;
    moved = moved * axes.sizes[axis] + place;
  }
  return moved;
}

// kEach: 2 or 4, for tiles with edges of 32 or 64.
template <int kEach>
__global__ void __launch_bounds__(kTileThreads, kEach == 2 ? 4 : 3) tap_products_kernel(TapProductsParams p) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto& panels = *reinterpret_cast<TilePanels<double, kEach>*>(memory);
  const int64_t edge = kTileAcross * kEach, across = tiles_across(p.rows, edge), tiles = across * across;
  const int64_t differences = p.axes.differences(), size = p.rows * p.cols;
  for (int64_t at = blockIdx.x; at < p.symbols * differences * tiles; at += gridDim.x) {
    const int64_t product = at / tiles, tile = at % tiles;
    const TapOffset difference = p.axes.difference(product % differences);
    const double* taps = p.taps + product / differences * p.axes.count() * size;
    const TilePlace place{tile / across * edge, tile % across * edge};
    TileSums<double, kEach> sums;
    for (int64_t k = 0; k < p.axes.count(); ++k) {
      const int64_t moved = moved_tap(p.axes, k, difference);
      if (moved < 0) continue;
      const RowMajor<double> left{taps + moved * size, p.cols}, right{taps + k * size, p.cols};
      add_products(left, right, p.rows, place, panels, sums);
    }
    for (int r = 0; r < kEach; ++r) {
      for (int c = 0; c < kEach; ++c) {
        const int64_t i = place.row + sums.row(r), j = place.column + sums.column(c);
        if (i < p.rows && j < p.rows) p.out[(product * p.rows + i) * p.rows + j] = sums.at[r][c];
      }
    }
  }
}

}  // namespace lipfast::cuda

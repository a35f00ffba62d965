// How many tiles with an edge matrices are cut into.
#pragma once

#include "../params.h"

namespace lipfast::cuda {

// Along an edge, and in the lower triangle.
LIPFAST_SHARED int64_t tiles_across(int64_t side, int64_t edge) { return (side + edge - 1) / edge; }
LIPFAST_SHARED int64_t lower_tiles(int64_t side, int64_t edge) {
  const int64_t across = tiles_across(side, edge);
  return across * (across + 1) / 2;
}

// Those of the residual of a factor, each with sums of its own.
constexpr int64_t kResidualTile = 32;
LIPFAST_SHARED int64_t residual_tiles(int64_t side) { return lower_tiles(side, kResidualTile); }

}  // namespace lipfast::cuda

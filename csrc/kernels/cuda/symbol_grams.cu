#include "launch.cuh"
#include "symbol_grams.cuh"

namespace lipfast::cuda {

void launch_symbol_grams_cuda(const SymbolGramsParams& p, void* stream) {
  constexpr char kOp[] = "symbol_grams";
  const int64_t tiles = lower_tiles(p.rows, kSymbolTile);
  Grid grid{p.count * tiles, kSymbolThreads, sizeof(SymbolGramsShared)};
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, &symbol_grams_kernel, grid));
  launch(kOp, &symbol_grams_kernel, grid, stream, p, tiles);
}

}  // namespace lipfast::cuda

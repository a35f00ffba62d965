#include "launch.cuh"
#include "symbol_grams.cuh"

namespace lipfast::cuda {

void launch_symbol_grams_cuda(const SymbolGramsParams& p, void* stream) {
  const int64_t tiles = lower_tiles(p.rows, kSymbolTile);
  launch_in_turn("symbol_grams", &symbol_grams_kernel, {p.count * tiles, kSymbolThreads, sizeof(SymbolGramsShared)},
                 stream, p, tiles);
}

}  // namespace lipfast::cuda

#include "shifted_grams.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

void launch_shifted_grams_cuda(const ShiftedGramParams& p, void* stream) {
  const int64_t tiles = lower_tiles(p.matrices.side, kGramTile);
  const auto kernel =
      p.matrices.dtype == Dtype::kFloat32 ? &shifted_grams_kernel<float> : &shifted_grams_kernel<double>;
  launch_in_turn("shifted_grams", kernel,
                 {p.matrices.batch * tiles, kTileThreads, sizeof(TilePanels<double, kGramEach>)}, stream, p, tiles);
}

}  // namespace lipfast::cuda

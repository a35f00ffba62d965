#include "shifted_grams.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

void launch_shifted_grams_cuda(const ShiftedGramParams& p, void* stream) {
  constexpr char kOp[] = "shifted_grams";
  const int64_t tiles = gram_tiles(p.matrices.side);
  Grid grid{p.matrices.batch * tiles, kGramThreads, sizeof(GramShared)};
  const auto kernel =
      p.matrices.dtype == Dtype::kFloat32 ? &shifted_grams_kernel<float> : &shifted_grams_kernel<double>;
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, kernel, grid));
  launch(kOp, kernel, grid, stream, p, tiles);
}

}  // namespace lipfast::cuda

#include "hermitian_residual.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

void launch_hermitian_residual_cuda(const HermitianResidualParams& p, void* stream) {
  constexpr char kOp[] = "hermitian_residual";
  const int64_t tiles = hermitian_tiles(p.side);
  Grid grid{p.batch * tiles, kTileThreads, sizeof(HermitianShared)};
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, &hermitian_residual_kernel, grid));
  launch(kOp, &hermitian_residual_kernel, grid, stream, p, tiles);
}

}  // namespace lipfast::cuda

#include "cholesky_residual.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

void launch_cholesky_residual_cuda(const ResidualParams& p, void* stream) {
  constexpr char kOp[] = "cholesky_residual";
  const int64_t tiles = residual_tiles(p.side);
  Grid grid{p.batch * tiles, kResidualThreads, sizeof(ResidualShared)};
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, &cholesky_residual_kernel, grid));
  launch(kOp, &cholesky_residual_kernel, grid, stream, p, tiles);
}

}  // namespace lipfast::cuda

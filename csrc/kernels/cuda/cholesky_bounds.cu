#include "cholesky_bounds.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

int64_t bound_tiles(int64_t side) { return gram_tiles(side); }

void launch_cholesky_bounds_cuda(const CholeskyBoundParams& p, void* stream) {
  constexpr char kOp[] = "cholesky_bounds";
  const int64_t tiles = gram_tiles(p.matrices.side);
  Grid grid{p.matrices.batch * tiles, kGramThreads, sizeof(GramShared)};
  const auto kernel =
      p.matrices.dtype == Dtype::kFloat32 ? &residual_parts_kernel<float> : &residual_parts_kernel<double>;
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, kernel, grid));
  launch(kOp, kernel, grid, stream, p, tiles);
  Grid last{p.matrices.batch, kBoundThreads, kMaxWarps * static_cast<int64_t>(sizeof(double))};
  last.blocks = std::min(last.blocks, resident_blocks(kOp, &cholesky_bounds_kernel, last));
  launch(kOp, &cholesky_bounds_kernel, last, stream, p, tiles);
}

}  // namespace lipfast::cuda

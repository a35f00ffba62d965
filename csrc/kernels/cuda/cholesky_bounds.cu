#include "cholesky_bounds.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

void launch_cholesky_bounds_cuda(const CholeskyBoundParams& p, void* stream) {
  constexpr char kOp[] = "cholesky_bounds";
  const int64_t batch = p.matrices.batch, tiles = residual_tiles(p.matrices.side);
  const auto kernel =
      p.matrices.dtype == Dtype::kFloat32 ? &residual_parts_kernel<float> : &residual_parts_kernel<double>;
  launch_in_turn(kOp, kernel, {batch * tiles, kTileThreads, sizeof(ResidualShared<double>)}, stream, p, tiles);
  launch_in_turn(kOp, &cholesky_bounds_kernel, {batch, kBoundThreads, kMaxWarps * sizeof(double)}, stream, p, tiles);
}

}  // namespace lipfast::cuda

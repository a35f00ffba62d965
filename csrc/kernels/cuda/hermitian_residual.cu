#include "hermitian_residual.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

void launch_hermitian_residual_cuda(const HermitianResidualParams& p, void* stream) {
  const int64_t tiles = residual_tiles(p.side);
  launch_in_turn("hermitian_residual", &hermitian_residual_kernel,
                 {p.batch * tiles, kTileThreads, sizeof(ResidualShared<Complex>)}, stream, p, tiles);
}

}  // namespace lipfast::cuda

#include "cholesky_residual.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

int launch_cholesky_residual_cuda(const ResidualParams& p, void* stream) {
  const int64_t tiles = residual_tiles(p.side), items = p.batch * tiles;
  if (items == 0) return cudaSuccess;
  int64_t blocks = 0;
  const cudaError_t error = resident_blocks(reinterpret_cast<const void*>(&cholesky_residual_kernel), kResidualThreads,
                                            sizeof(ResidualShared), &blocks);
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(std::min(blocks, items));
  cholesky_residual_kernel<<<grid, kResidualThreads, sizeof(ResidualShared), static_cast<cudaStream_t>(stream)>>>(
      p, tiles);
  return cudaGetLastError();
}

}  // namespace lipfast::cuda

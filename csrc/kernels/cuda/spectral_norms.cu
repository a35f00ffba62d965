#include "spectral_norms.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

static_assert(sizeof(SpectralShared) == 38352, "cuda_report.py counts with it");
static_assert(sizeof(SpectralChunk) + sizeof(SpectralLaunch) + 16 <= 4096, "kernel arguments hold 4 KB");

int launch_spectral_norms_cuda(const SpectralPlan& plan, const SpectralLaunch& launch, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  for (int64_t first = 0; first < launch.count; first += kChunkEntries) {
    SpectralChunk chunk{};
    const int64_t count = std::min<int64_t>(kChunkEntries, launch.count - first);
    std::copy_n(plan.entries.begin() + first, count, chunk.entries);
    spectral_table_kernel<<<1, 64, 0, queue>>>(chunk, first, count, launch);
  }
  int64_t blocks = 0;
  constexpr int64_t kShared = sizeof(SpectralShared);
  cudaError_t error =
      resident_blocks(reinterpret_cast<const void*>(&spectral_norms_kernel), kSpectralThreads, kShared, &blocks);
  if (error != cudaSuccess) return error;
  // A grid barrier needs all blocks resident; more blocks than work items would only wait there.
  const dim3 grid(static_cast<unsigned>(std::min(blocks, std::max(launch.items, launch.count))));
  SpectralLaunch argument = launch;
  void* arguments[] = {&argument};
  error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&spectral_norms_kernel), grid,
                                      dim3(kSpectralThreads), arguments, kShared, queue);
  // Also what the tables' launches left.
  return error != cudaSuccess ? taken(error) : cudaGetLastError();
}

}  // namespace lipfast::cuda

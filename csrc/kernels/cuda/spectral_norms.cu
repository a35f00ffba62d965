#include "spectral_norms.cuh"
#include "launch.cuh"

namespace lipfast::cuda {

static_assert(sizeof(SpectralShared) == 38352, "cuda_report.py counts with it");
static_assert(sizeof(SpectralChunk) + sizeof(SpectralLaunch) + 16 <= 4096, "kernel arguments hold 4 KB");

void launch_spectral_norms_cuda(const SpectralPlan& plan, const SpectralLaunch& p, void* stream) {
  constexpr char kOp[] = "spectral_norms";
  for (int64_t first = 0; first < p.count; first += kChunkEntries) {
    SpectralChunk chunk{};
    const int64_t count = std::min<int64_t>(kChunkEntries, p.count - first);
    std::copy_n(plan.entries.begin() + first, count, chunk.entries);
    launch(kOp, &spectral_table_kernel, {1, 64}, stream, chunk, first, count, p);
  }
  // A grid barrier needs all blocks resident; more blocks than work items would only wait there.
  Grid grid{std::max(p.items, p.count), kSpectralThreads, sizeof(SpectralShared), true};
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, &spectral_norms_kernel, grid));
  launch(kOp, &spectral_norms_kernel, grid, stream, p);
}

}  // namespace lipfast::cuda

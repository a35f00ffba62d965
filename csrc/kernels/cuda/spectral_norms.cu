#include "spectral_norms.cuh"
#include "launch.cuh"
#include "spectral_resident.cuh"

namespace lipfast::cuda {

static_assert(sizeof(SpectralShared) == 38352, "cuda_report.py counts with it");
static_assert(sizeof(SpectralChunk) + sizeof(SpectralLaunch) <= 4096, "kernel arguments hold 4 KB");

namespace {

constexpr char kOp[] = "spectral_norms";
constexpr int64_t kTableThreads = 64;

// Matrices that one block holds: of one size.
void launch_resident(const SpectralPlan& plan, const SpectralLaunch& p, int32_t size, void* stream) {
  if (plan.resident[size] == 0) return;
  // Two small blocks share a multiprocessor's memory, as far as a device of compute capability 8.0 has it.
  const int64_t shared = size == 0 ? kSmallResidentShared : kLargeResidentShared;
  Grid grid{plan.resident[size], size == 0 ? kSmallResidentThreads : kSpectralThreads, shared};
  grid.blocks = std::min({grid.blocks, kResidentSlots, resident_blocks(kOp, &spectral_resident_kernel, grid)});
  launch(kOp, &spectral_resident_kernel, grid, stream, p, ResidentSize{size, shared});
}

}  // namespace

void launch_spectral_norms_cuda(const SpectralPlan& plan, const SpectralLaunch& p, void* stream) {
  for (const SpectralChunk& chunk : plan.chunks()) {
    const int64_t blocks = (chunk.period * chunk.repeats + kTableThreads - 1) / kTableThreads;
    launch(kOp, &spectral_table_kernel, {blocks, kTableThreads}, stream, chunk, p);
  }
  launch_resident(plan, p, 0, stream);
  launch_resident(plan, p, 1, stream);
  if (p.items == 0) return;
  // A grid barrier needs all blocks resident; more blocks than work items would only wait there.
  Grid grid{std::max(p.items, p.sums), kSpectralThreads, sizeof(SpectralShared), true};
  grid.blocks = std::min(grid.blocks, resident_blocks(kOp, &spectral_norms_kernel, grid));
  launch(kOp, &spectral_norms_kernel, grid, stream, p);
}

}  // namespace lipfast::cuda

#include "chain_secants.cuh"
#include "launch.cuh"

namespace lipfast::cuda {
namespace {

static_assert(sizeof(SecantChains) + sizeof(LinesLayout) + sizeof(SecantLines) + 8 <= 4096,
              "kernel arguments hold 4 KB");
static_assert(sizeof(SecantChains) + sizeof(SecantQuotients) + 8 <= 4096, "kernel arguments hold 4 KB");

constexpr char kOp[] = "chain_secants";
constexpr int64_t kWorkspaceBytes = int64_t{2} << 30;  // in all
constexpr Grid kLinesGrid{0, kSecantThreads, sizeof(LineBuffers)};
constexpr Grid kQuotientsGrid{0, kSecantThreads, sizeof(EnclosureShared)};

auto lines_kernel(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? &secant_lines_kernel<float> : &secant_lines_kernel<double>;
}
auto quotients_kernel(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? &secant_quotients_kernel<float> : &secant_quotients_kernel<double>;
}

SecantPlan plan_of(int64_t networks, int64_t resident, int64_t doubles) {
  const int64_t fit = std::max<int64_t>(1, kWorkspaceBytes / (8 * doubles));
  return {std::min({networks, resident, fit}), doubles};
}

Grid with_blocks(Grid grid, int64_t blocks) {
  grid.blocks = blocks;
  return grid;
}

}  // namespace

SecantPlan plan_secant_lines_cuda(const SecantChains& chains, Dtype dtype) {
  return plan_of(chains.networks, resident_blocks(kOp, lines_kernel(dtype), kLinesGrid), LinesLayout(chains).doubles());
}

SecantPlan plan_secant_quotients_cuda(const SecantChains& chains, Dtype dtype) {
  return plan_of(chains.networks, resident_blocks(kOp, quotients_kernel(dtype), kQuotientsGrid),
                 enclosure_doubles(chains.widest));
}

void launch_secant_lines_cuda(const SecantChains& chains, Dtype dtype, const SecantLines& lines, const SecantPlan& plan,
                              double* workspace, void* stream) {
  launch(kOp, lines_kernel(dtype), with_blocks(kLinesGrid, plan.blocks), stream, chains, LinesLayout(chains), lines,
         workspace);
}

void launch_secant_quotients_cuda(const SecantChains& chains, Dtype dtype, const SecantQuotients& quotients,
                                  const SecantPlan& plan, double* workspace, void* stream) {
  launch(kOp, quotients_kernel(dtype), with_blocks(kQuotientsGrid, plan.blocks), stream, chains, quotients, workspace);
}

}  // namespace lipfast::cuda

#include "chain_jacobian_norms.cuh"
#include "launch.cuh"

namespace lipfast::cuda {
namespace {

static_assert(sizeof(ChainLaunch) + sizeof(ChainLayout) + 16 <= 4096, "kernel arguments hold 4 KB");

constexpr char kOp[] = "chain_jacobian_norms";
constexpr int64_t kWorkspaceBytes = int64_t{2} << 30;  // in all

struct ChainKernel {
  void (*kernel)(ChainLaunch, ChainLayout, double*, char*);
  int64_t side;                                          // up to which warps reduce
  int64_t (*shared)(const ChainLaunch&, int64_t warps);  // bytes
};

template <class T, int kRows, bool kDense>
ChainKernel kernel_of() {
  return {&chain_jacobian_norms_kernel<T, kRows, kDense>, kChainSide<kRows, kDense>,
          [](const ChainLaunch& chain, int64_t warps) {
            const int64_t outputs = chain.widths[chain.layers], inputs = chain.widths[0];
            return ChainShared<T>{warps, kRows, reduction_bytes<kRows, kDense>(outputs, inputs, warps), kDense}.bytes();
          }};
}

template <class T, bool kDense>
ChainKernel kernel_of(int rows) {
  return rows == 4 ? kernel_of<T, 4, kDense>() : rows == 8 ? kernel_of<T, 8, kDense>() : kernel_of<T, 10, kDense>();
}

ChainKernel kernel_for(const ChainLaunch& chain, Dtype dtype) {
  const int rows = chain_rows(chain.widths[chain.layers]);
  if (dtype == Dtype::kFloat64) return kernel_of<double, false>(rows);
  return is_dense(chain) ? kernel_of<float, true>(rows) : kernel_of<float, false>(rows);
}

int64_t tiles(const ChainLaunch& chain, const ChainPlan& plan) {
  const int64_t samples = plan.warps * plan.rounds;
  return chain.networks * ((chain.batch + samples - 1) / samples);
}

}  // namespace

// Large blocks read W for more samples at a time; they are no use where the device would not be full of them.
ChainPlan plan_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype) {
  const ChainKernel chosen = kernel_for(chain, dtype);
  const ReduceLayout reduction(chain.widths[chain.layers], chain.widths[0]);
  const int64_t most = most_shared(kOp), rounds = reduction.side <= chosen.side ? kMaxChainRounds : 1;
  ChainPlan plan{kMaxChainWarps + kMinChainWarps, 0, 0, 0, reduction.global()};
  int64_t shared, resident;
  do {
    plan.warps -= kMinChainWarps;
    plan.rounds = rounds;
    shared = chosen.shared(chain, plan.warps);
    if (shared > most && plan.warps > kMinChainWarps) continue;
    resident = resident_blocks(kOp, chosen.kernel, {0, kWarp * plan.warps, shared});
    while (plan.rounds > 1 && tiles(chain, plan) < resident) --plan.rounds;
  } while (plan.warps > kMinChainWarps && (shared > most || tiles(chain, plan) < resident));
  plan.bytes = ChainLayout(chain, dtype, plan.warps, plan.rounds).bytes();
  const int64_t fit = std::max<int64_t>(1, kWorkspaceBytes / (plan.bytes + 8 * plan.reduce));
  plan.blocks = std::min({resident, tiles(chain, plan), fit});
  return plan;
}

void launch_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype, const ChainPlan& plan,
                                      double* reduce_workspace, void* workspace, void* stream) {
  const ChainKernel chosen = kernel_for(chain, dtype);
  launch(kOp, chosen.kernel, {plan.blocks, kWarp * plan.warps, chosen.shared(chain, plan.warps)}, stream, chain,
         ChainLayout(chain, dtype, plan.warps, plan.rounds), reduce_workspace, static_cast<char*>(workspace));
}

}  // namespace lipfast::cuda

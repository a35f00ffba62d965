#include "chain_jacobian_norms.cuh"
#include "launch.cuh"

namespace lipfast::cuda {
namespace {

static_assert(sizeof(ChainLaunch) + sizeof(ChainLayout) + 16 <= 4096, "kernel arguments hold 4 KB");

constexpr char kOp[] = "chain_jacobian_norms";
constexpr int64_t kWorkspaceBytes = int64_t{2} << 30;  // in all

using Kernel = void (*)(ChainLaunch, ChainLayout, double*, char*);

Kernel kernel_for(const ChainLaunch& chain, Dtype dtype) {
  const bool few = chain_rows(chain.widths[chain.layers]) == 4;
  if (dtype == Dtype::kFloat32) {
    return few ? &chain_jacobian_norms_kernel<float, 4> : &chain_jacobian_norms_kernel<float, 12>;
  }
  return few ? &chain_jacobian_norms_kernel<double, 4> : &chain_jacobian_norms_kernel<double, 12>;
}

int64_t shared_bytes(const ChainLaunch& chain, Dtype dtype) {
  const int64_t outputs = chain.widths[chain.layers], inputs = chain.widths[0];
  return dtype == Dtype::kFloat32 ? chain_shared<float>(outputs, inputs) : chain_shared<double>(outputs, inputs);
}

}  // namespace

ChainPlan plan_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype) {
  const ChainLayout layout(chain, dtype);
  const ReduceLayout reduction(chain.widths[chain.layers], chain.widths[0]);
  const int64_t resident =
      resident_blocks(kOp, kernel_for(chain, dtype), {0, kChainThreads, shared_bytes(chain, dtype)});
  const int64_t per_block = layout.bytes() + 8 * reduction.global();
  const int64_t items = chain.networks * ((chain.batch + kChainSamples - 1) / kChainSamples);
  const int64_t fit = std::max<int64_t>(1, kWorkspaceBytes / std::max<int64_t>(1, per_block));
  return {std::min({resident, items, fit}), layout.bytes(), reduction.global()};
}

void launch_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype, const ChainPlan& plan,
                                      double* reduce_workspace, void* workspace, void* stream) {
  launch(kOp, kernel_for(chain, dtype), {plan.blocks, kChainThreads, shared_bytes(chain, dtype)}, stream, chain,
         ChainLayout(chain, dtype), reduce_workspace, static_cast<char*>(workspace));
}

}  // namespace lipfast::cuda

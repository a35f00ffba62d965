#include "chain_jacobian_norms.cuh"
#include "launch.cuh"

namespace lipfast::cuda {
namespace {

static_assert(sizeof(ChainLaunch) + sizeof(ChainLayout) + 16 <= 4096, "kernel arguments hold 4 KB");

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
  int64_t blocks = 0;
  const cudaError_t error = resident_blocks(reinterpret_cast<const void*>(kernel_for(chain, dtype)), kChainThreads,
                                            shared_bytes(chain, dtype), &blocks);
  const int64_t per_block = layout.bytes() + 8 * reduction.global();
  const int64_t items = chain.networks * ((chain.batch + kChainSamples - 1) / kChainSamples);
  blocks = std::min({blocks, items, std::max<int64_t>(1, kWorkspaceBytes / std::max<int64_t>(1, per_block))});
  return {blocks, layout.bytes(), reduction.global(), error};
}

int launch_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype, const ChainPlan& plan,
                                     double* reduce_workspace, void* workspace, void* stream) {
  if (chain.batch == 0) return cudaSuccess;
  const Kernel kernel = kernel_for(chain, dtype);
  kernel<<<static_cast<unsigned>(plan.blocks), kChainThreads, shared_bytes(chain, dtype),
           static_cast<cudaStream_t>(stream)>>>(chain, ChainLayout(chain, dtype), reduce_workspace,
                                                static_cast<char*>(workspace));
  return cudaGetLastError();
}

}  // namespace lipfast::cuda

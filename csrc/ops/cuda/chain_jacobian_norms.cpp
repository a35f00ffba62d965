#include "../../kernels/cuda/chain_jacobian_norms.h"

#include <tuple>

#include "chain_maps.h"

namespace lipfast {
namespace {

// Sets the layers, widths and activations of a chain of linear stages with pointwise activations after each.
void read_chain(const ChainStages& decoded, cuda::ChainLaunch& chain) {
  chain.widths[0] = narrow_width(elements(decoded.in), "chain_jacobian_norms");
  int32_t activations = 0;
  for (size_t i = 0; i < decoded.stages.size(); ++i) {
    const ChainStage& stage = decoded.stages[i];
    if (stage.kind == StageKind::kLinear) {
      STD_TORCH_CHECK(chain.layers < cuda::kMaxChainLayers, "chain_jacobian_norms: on CUDA at most ",
                      cuda::kMaxChainLayers, " layers");
      chain.widths[++chain.layers] = narrow_width(stage.out.channels, "chain_jacobian_norms");
    } else {
      STD_TORCH_CHECK(stage.kind == StageKind::kActivation && chain.layers > 0, "chain_jacobian_norms: stage ", i,
                      ": on CUDA a chain is linear stages with activations after them");
      STD_TORCH_CHECK(activations < cuda::kMaxChainActivations, "chain_jacobian_norms: on CUDA at most ",
                      cuda::kMaxChainActivations, " activations");
      chain.activations[activations++] = {stage.activation, {stage.parameters[0], stage.parameters[1]}};
    }
    chain.starts[chain.layers] = static_cast<uint8_t>(activations);
  }
}

std::tuple<Tensor, Tensor> chain_jacobian_norms_cuda(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                     std::vector<int64_t> stages, std::vector<double> parameters) {
  const ChainStages decoded = check_chain_jacobian_norms(x, weights, biases, stages, parameters);
  cuda::ChainLaunch chain{};
  read_chain(decoded, chain);
  const NetworksOnDevice all(weights, biases, chain.layers, x, "chain_jacobian_norms");
  const DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0), networks = all.count();
  Tensor spectral = torch::stable::new_empty(x, {networks, batch});
  Tensor frobenius = torch::stable::new_empty(x, {networks, batch});
  if (batch == 0) return {spectral, frobenius};
  const Dtype dtype = dtype_of(x);
  const int64_t element = dtype == Dtype::kFloat32 ? 4 : 8;
  chain.x = x.data_ptr();
  chain.batch = batch;
  for (int64_t first = 0; first < networks; first += chain.networks) {
    chain.networks = static_cast<int32_t>(all.take(first, chain.weights, chain.biases));
    chain.spectral = static_cast<char*>(spectral.data_ptr()) + first * batch * element;
    chain.frobenius = static_cast<char*>(frobenius.data_ptr()) + first * batch * element;
    const cuda::ChainPlan plan = cuda::plan_chain_jacobian_norms_cuda(chain, dtype);
    Tensor workspace = bytes_like(x, plan.blocks * plan.bytes);
    Tensor reduce_workspace = bytes_like(x, 8 * plan.blocks * plan.reduce);
    cuda::launch_chain_jacobian_norms_cuda(chain, dtype, plan, mutable_values<double>(reduce_workspace),
                                           workspace.data_ptr(), current_stream(x));
  }
  return {spectral, frobenius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("chain_jacobian_norms", TORCH_BOX(&chain_jacobian_norms_cuda)); }

}  // namespace lipfast

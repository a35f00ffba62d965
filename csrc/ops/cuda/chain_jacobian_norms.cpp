#include "../../kernels/cuda/chain_jacobian_norms.h"

#include <algorithm>
#include <tuple>

#include "device.h"

namespace lipfast {
namespace {

// The widths and the slopes of a chain of linear stages with ReLU, LeakyReLU or nothing after each.
void read_chain(const ChainStages& chain, std::vector<int64_t>& widths, std::vector<double>& slopes) {
  widths.push_back(elements(chain.in));
  for (size_t i = 0; i < chain.stages.size(); ++i) {
    const ChainStage& stage = chain.stages[i];
    if (stage.kind == StageKind::kLinear) {
      widths.push_back(stage.out.channels);
      slopes.push_back(1);
      continue;
    }
    const bool piecewise = stage.kind == StageKind::kActivation &&
                           (stage.activation == Activation::kReLU || stage.activation == Activation::kLeakyReLU);
    // Slopes of activations in a row multiply as long as the sign is kept.
    STD_TORCH_CHECK(piecewise && !slopes.empty() && slopes.back() >= 0, "chain_jacobian_norms: stage ", i,
                    ": on CUDA a chain is linear stages with ReLU or LeakyReLU between them");
    slopes.back() *= stage.activation == Activation::kReLU ? 0 : stage.parameters[0];
  }
}

std::tuple<Tensor, Tensor> chain_jacobian_norms_cuda(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                     std::vector<int64_t> stages, std::vector<double> parameters) {
  const ChainStages decoded = check_chain_jacobian_norms(x, weights, biases, stages, parameters);
  std::vector<int64_t> widths;
  std::vector<double> slopes;
  read_chain(decoded, widths, slopes);
  const auto layers = static_cast<int64_t>(slopes.size());
  STD_TORCH_CHECK(layers <= cuda::kMaxChainLayers, "chain_jacobian_norms: at most ", cuda::kMaxChainLayers,
                  " layers on CUDA, got ", layers);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_device(weights[i], x, "chain_jacobian_norms: weight " + std::to_string(i));
    if (biases[i].numel() > 0) check_device(biases[i], x, "chain_jacobian_norms: bias " + std::to_string(i));
  }
  for (const int64_t width : widths) {
    STD_TORCH_CHECK(width < int64_t{1} << 31, "chain_jacobian_norms: a layer of ", width, " units is too wide");
  }
  const DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0), networks = static_cast<int64_t>(weights.size()) / layers;
  Tensor spectral = torch::stable::new_empty(x, {networks, batch});
  Tensor frobenius = torch::stable::new_empty(x, {networks, batch});
  if (batch == 0) return {spectral, frobenius};
  const Dtype dtype = dtype_of(x);
  const int64_t element = dtype == Dtype::kFloat32 ? 4 : 8, most = cuda::kMaxChainMaps / layers;
  cuda::ChainLaunch chain{};
  chain.x = x.data_ptr();
  chain.batch = batch;
  chain.layers = static_cast<int32_t>(layers);
  std::copy(slopes.begin(), slopes.end(), chain.slopes);
  std::transform(widths.begin(), widths.end(), chain.widths, [](int64_t width) { return static_cast<int32_t>(width); });
  for (int64_t first = 0; first < networks; first += most) {
    chain.networks = static_cast<int32_t>(std::min(most, networks - first));
    for (int64_t i = 0; i < chain.networks * layers; ++i) {
      const Tensor& bias = biases[first * layers + i];
      chain.weights[i] = weights[first * layers + i].data_ptr();
      chain.biases[i] = bias.numel() > 0 ? bias.data_ptr() : nullptr;
    }
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

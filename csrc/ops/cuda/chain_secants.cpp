#include "../../kernels/cuda/chain_secants.h"

#include <limits>
#include <tuple>

#include "chain_maps.h"

namespace lipfast {
namespace {

constexpr char kOp[] = "chain_secants";

cuda::PiecewiseLinear piecewise_linear(const SecantStage& stage) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  switch (stage.activation) {
    case Activation::kLeakyReLU:
      return {0, kInfinity, stage.parameters[0], true, false};
    case Activation::kReLU6:
      return {0, 6, 0, false, true};
    case Activation::kHardtanh:
      return {stage.parameters[0], stage.parameters[1], 0, false, false};
    default:
      return {0, kInfinity, 0, false, false};
  }
}

cuda::SecantChains read_chains(const SecantStages& checked, int64_t norm) {
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, kOp, ": norm: expected 0, 1 or 2, got ", norm);
  STD_TORCH_CHECK(checked.affine <= cuda::kMaxSecantLayers, kOp, ": on CUDA at most ", cuda::kMaxSecantLayers,
                  " linear stages");
  cuda::SecantChains chains{};
  chains.widths[0] = narrow_width(checked.inputs, kOp);
  chains.widest = narrow_width(checked.widest, kOp);
  chains.norm = static_cast<int32_t>(norm);
  int32_t activations = 0;
  for (const SecantStage& stage : checked.stages) {
    if (stage.linear) {
      chains.widths[++chains.layers] = narrow_width(stage.out, kOp);
    } else {
      STD_TORCH_CHECK(activations < cuda::kMaxSecantActivations, kOp, ": on CUDA at most ", cuda::kMaxSecantActivations,
                      " activations");
      chains.activations[activations++] = piecewise_linear(stage);
    }
    chains.starts[chains.layers + 1] = static_cast<uint8_t>(activations);
  }
  return chains;
}

Tensor points_cuda(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<int64_t> stages,
                   std::vector<double> parameters, int64_t norm, std::vector<double> fractions,
                   std::vector<double> ladder, double longest) {
  const SecantStages checked = check_chain_secants(x, 2, weights, biases, stages, parameters);
  cuda::SecantChains chains = read_chains(checked, norm);
  const NetworksOnDevice all(weights, biases, chains.layers, x, kOp);
  STD_TORCH_CHECK(std::min(checked.inputs, checked.outputs) <= cuda::kMaxSecantSide, kOp, ": on CUDA at most ",
                  cuda::kMaxSecantSide, " inputs or outputs");
  cuda::SecantLines lines{};
  const size_t count = fractions.size() + ladder.size();
  STD_TORCH_CHECK(count <= cuda::kMaxSecantSteps, kOp, ": at most ", cuda::kMaxSecantSteps, " steps, got ", count);
  lines.fractions = static_cast<int32_t>(fractions.size());
  lines.count = static_cast<int32_t>(count);
  lines.longest = longest;
  std::copy(fractions.begin(), fractions.end(), lines.steps);
  std::copy(ladder.begin(), ladder.end(), lines.steps + fractions.size());
  const DeviceGuard guard(x.get_device_index());
  const Dtype dtype = dtype_of(weights[0]);
  const int64_t points = 1 + 2 * lines.count;
  Tensor result = torch::stable::new_empty(x, {all.count(), points, checked.inputs});
  for (int64_t first = 0; first < all.count(); first += chains.networks) {
    chains.networks = static_cast<int32_t>(all.take(first, chains.weights, chains.biases));
    lines.x = values<double>(x) + first * checked.inputs;
    lines.points = mutable_values<double>(result) + first * points * checked.inputs;
    const cuda::SecantPlan plan = cuda::plan_secant_lines_cuda(chains, dtype);
    Tensor workspace = bytes_like(x, 8 * plan.blocks * plan.doubles);
    cuda::launch_secant_lines_cuda(chains, dtype, lines, plan, mutable_values<double>(workspace), current_stream(x));
  }
  return result;
}

std::tuple<Tensor, Tensor> quotients_cuda(Tensor points, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          std::vector<int64_t> stages, std::vector<double> parameters, int64_t norm,
                                          double tight) {
  const SecantStages checked = check_chain_secants(points, 3, weights, biases, stages, parameters);
  cuda::SecantChains chains = read_chains(checked, norm);
  const NetworksOnDevice all(weights, biases, chains.layers, points, kOp);
  const int64_t count = points.size(1), steps = (count - 1) / 2;
  STD_TORCH_CHECK(count % 2 == 1 && steps > 0 && steps <= cuda::kMaxSecantSteps, kOp,
                  ": points: expected a sample and up to ", cuda::kMaxSecantSteps, " pairs, got ", count);
  const DeviceGuard guard(points.get_device_index());
  const Dtype dtype = dtype_of(weights[0]);
  Tensor found = torch::stable::new_empty(points, {all.count(), 2});
  Tensor ends = torch::stable::new_empty(points, {all.count(), 2, checked.inputs});
  for (int64_t first = 0; first < all.count(); first += chains.networks) {
    chains.networks = static_cast<int32_t>(all.take(first, chains.weights, chains.biases));
    const cuda::SecantQuotients quotients{values<double>(points) + first * count * checked.inputs,
                                          static_cast<int32_t>(steps), tight, mutable_values<double>(found) + 2 * first,
                                          mutable_values<double>(ends) + 2 * first * checked.inputs};
    const cuda::SecantPlan plan = cuda::plan_secant_quotients_cuda(chains, dtype);
    Tensor workspace = bytes_like(points, 8 * plan.blocks * plan.doubles);
    cuda::launch_secant_quotients_cuda(chains, dtype, quotients, plan, mutable_values<double>(workspace),
                                       current_stream(points));
  }
  return {found, ends};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) {
  m.impl("chain_secants_points", TORCH_BOX(&points_cuda));
  m.impl("chain_secants_quotients", TORCH_BOX(&quotients_cuda));
}

}  // namespace lipfast

// chain_secants: certified secants of piecewise-linear chains. Schemas, decoding of the stages and argument checks.
#include <algorithm>

#include "checks.h"

namespace lipfast {
namespace {

constexpr int64_t kLinearStage = -1;
constexpr int64_t kPiecewiseLinear = 4;  // activations: the first of them

// The weights of the first network give the shapes of all.
SecantStages decode(int64_t inputs, const std::vector<Tensor>& weights, const std::vector<int64_t>& stages,
                    const std::vector<double>& parameters) {
  SecantStages result{};
  result.inputs = result.widest = inputs;
  int64_t units = inputs;
  for (size_t i = 0; i < stages.size(); ++i) {
    const std::string name = "chain_secants: stage " + std::to_string(i);
    SecantStage stage{};
    stage.in = units;
    stage.linear = stages[i] == kLinearStage;
    if (stage.linear) {
      stage.affine = result.affine++;
      const Tensor& weight = weights[static_cast<size_t>(stage.affine)];
      check_dense(weight, 2, name + ": weight");
      STD_TORCH_CHECK(weight.size(1) == units && weight.size(0) > 0, name, ": expected a weight n x ", units, ", got ",
                      weight.size(0), " x ", weight.size(1));
      units = weight.size(0);
    } else {
      STD_TORCH_CHECK(stages[i] >= 0 && stages[i] < kPiecewiseLinear, name, ": unknown activation ", stages[i]);
      stage.activation = static_cast<Activation>(stages[i]);
      stage.parameters[0] = parameters[2 * i];
      stage.parameters[1] = parameters[2 * i + 1];
    }
    stage.out = units;
    result.widest = std::max(result.widest, units);
    result.stages.push_back(stage);
  }
  result.outputs = units;
  return result;
}

}  // namespace

SecantStages check_chain_secants(const Tensor& x, int64_t dimensions, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<int64_t>& stages,
                                 const std::vector<double>& parameters) {
  STD_TORCH_CHECK(check_dense(x, dimensions, "chain_secants: points") == Dtype::kFloat64,
                  "chain_secants: points: expected float64");
  const auto affine = static_cast<size_t>(std::count(stages.begin(), stages.end(), kLinearStage));
  STD_TORCH_CHECK(affine > 0, "chain_secants: a chain needs a linear stage");
  STD_TORCH_CHECK(parameters.size() == 2 * stages.size(), "chain_secants: ", parameters.size(), " parameters for ",
                  stages.size(), " stages");
  STD_TORCH_CHECK(!weights.empty() && weights.size() % affine == 0 && biases.size() == weights.size(),
                  "chain_secants: ", weights.size(), " weights and ", biases.size(), " biases for chains with ", affine,
                  " of each");
  const auto networks = static_cast<int64_t>(weights.size() / affine);
  STD_TORCH_CHECK(x.size(0) == networks, "chain_secants: points of ", x.size(0), " networks, weights of ", networks);
  const int64_t inputs = x.size(dimensions - 1);
  STD_TORCH_CHECK(inputs > 0, "chain_secants: points are empty");
  const SecantStages result = decode(inputs, weights, stages, parameters);
  check_networks(weights, biases, result.affine, weights[0].scalar_type(), "chain_secants");
  return result;
}

// weights, biases: network by network, map by map; an empty bias is none. x, direction: (networks, inputs); points:
// (networks, points, inputs). stages: -1 for a linear map, otherwise an Activation; parameters: 2 each.
LIPFAST_SCHEMA(
    "chain_secants_jacobians(Tensor x, Tensor[] weights, Tensor[] biases, int[] stages, float[] parameters) -> "
    "Tensor")
// reach: (networks, 2), backward and forward.
LIPFAST_SCHEMA(
    "chain_secants_kinks(Tensor x, Tensor direction, Tensor[] weights, Tensor[] biases, int[] stages, float[] "
    "parameters) -> Tensor")
LIPFAST_SCHEMA(
    "chain_secants_enclosures(Tensor points, Tensor[] weights, Tensor[] biases, int[] stages, float[] parameters) -> "
    "(Tensor values, Tensor errors)")
// On CUDA, all that the ops above are for, in two kernels. norm: 1, 2, or 0 for the largest entry. fractions: of the
// way to the nearest kinks, which is at most `longest` times max |x_i|; ladder: relative to that size. points:
// (networks, points, inputs).
LIPFAST_SCHEMA(
    "chain_secants_points(Tensor x, Tensor[] weights, Tensor[] biases, int[] stages, float[] parameters, int norm, "
    "float[] fractions, float[] ladder, float longest) -> Tensor")
// points: as chain_secants_points gives them, or moved. found: (networks, 2): the best proved quotient, and 1 where it
// is below `tight` times the best without errors, otherwise 0; ends: (networks, 2, inputs).
LIPFAST_SCHEMA(
    "chain_secants_quotients(Tensor points, Tensor[] weights, Tensor[] biases, int[] stages, float[] parameters, int "
    "norm, float tight) -> (Tensor found, Tensor ends)")

}  // namespace lipfast

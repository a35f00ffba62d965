// chain_quadratic: certified Lipschitz constants of chains by quadratic constraints. Schema and argument checks.
#include "checks.h"

namespace lipfast {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30;

// Per hidden layer (units), or (networks, units) where that may be.
void check_units(const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes, int64_t networks,
                 const std::string& what) {
  const size_t hidden = sizes.size() - 2;
  STD_TORCH_CHECK(tensors.size() == hidden, what, ": ", tensors.size(), " tensors for ", hidden, " hidden layers");
  for (size_t i = 0; i < hidden; ++i) {
    const Tensor& tensor = tensors[i];
    const std::string name = what + " " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(tensor, tensor.dim() == 1 ? 1 : 2, name) == Dtype::kFloat64, name,
                    ": expected float64");
    STD_TORCH_CHECK(tensor.dim() == 1 || tensor.size(0) == networks, name, ": expected ", networks, " networks, got ",
                    tensor.size(0));
    STD_TORCH_CHECK(tensor.size(tensor.dim() - 1) == sizes[i + 1], name, ": expected ", sizes[i + 1], " units, got ",
                    text(tensor));
  }
}

}  // namespace

std::vector<int64_t> check_chain_quadratic(const std::vector<Tensor>& weights, const std::vector<Tensor>& errors,
                                           const std::vector<Tensor>& means, const std::vector<Tensor>& products,
                                           const std::vector<Tensor>& start, int64_t layers, int64_t evaluations) {
  const std::string op = "chain_quadratic";
  STD_TORCH_CHECK(layers >= 2, op, ": expected at least 2 matrices, got ", layers);
  STD_TORCH_CHECK(evaluations >= 0 && evaluations < int64_t{1} << 30, op, ": evaluations: got ", evaluations);
  STD_TORCH_CHECK(!weights.empty() && weights.size() % static_cast<size_t>(layers) == 0, op, ": ", weights.size(),
                  " weights for chains of ", layers);
  const auto networks = static_cast<int64_t>(weights.size()) / layers;
  check_dense(weights[0], 2, op + ": weight 0");
  std::vector<int64_t> sizes{weights[0].size(1)};
  for (int64_t i = 0; i < layers; ++i) {
    const Tensor& weight = weights[static_cast<size_t>(i)];
    const std::string name = op + ": weight " + std::to_string(i);
    check_dense(weight, 2, name);
    STD_TORCH_CHECK(weight.size(1) == sizes.back(), name, ": expected ", sizes.back(), " columns, got ", text(weight));
    STD_TORCH_CHECK(weight.numel() > 0 && weight.size(0) < kMostRows && weight.size(1) < kMostRows, name, ": is ",
                    text(weight), "; sides are between 1 and 2^30");
    sizes.push_back(weight.size(0));
  }
  const std::vector<Tensor> none(weights.size(), torch::stable::new_empty(weights[0], {0}));
  check_networks(weights, none, layers, weights[0].scalar_type(), op);
  STD_TORCH_CHECK(errors.empty() || errors.size() == weights.size(), op, ": ", errors.size(), " errors for ",
                  weights.size(), " weights");
  for (size_t i = 0; i < errors.size(); ++i) {
    if (errors[i].numel() == 0) continue;
    const std::string name = op + ": error " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(errors[i], 2, name) == Dtype::kFloat64, name, ": expected float64");
    STD_TORCH_CHECK(errors[i].size(0) == weights[i].size(0) && errors[i].size(1) == weights[i].size(1), name,
                    ": expected ", text(weights[i]), ", got ", text(errors[i]));
  }
  check_units(means, sizes, networks, op + ": means");
  check_units(products, sizes, networks, op + ": products");
  if (!start.empty()) check_units(start, sizes, networks, op + ": start");
  return sizes;
}

// weights: network by network, matrix by matrix; errors: none, or alike, float64, empty for none. means, products,
// start (or none): per hidden layer (units) or (networks, units), float64. numbers: (networks, 3), the logarithm of the
// bound, the bound, rho^2. multipliers, logs, unit_exponents: (networks, all hidden units); weight_exponents:
// (networks, layers).
LIPFAST_SCHEMA(
    "chain_quadratic(Tensor[] weights, Tensor[] errors, Tensor[] means, Tensor[] products, Tensor[] start, int layers, "
    "int evaluations) -> (Tensor numbers, Tensor evaluated, Tensor multipliers, Tensor logs, Tensor unit_exponents, "
    "Tensor weight_exponents)")

}  // namespace lipfast

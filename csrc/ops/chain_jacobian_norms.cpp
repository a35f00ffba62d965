// chain_jacobian_norms: per-sample Jacobian norms of chains of affine maps. Schema and argument checks.
#include "checks.h"

namespace lipfast {

std::vector<int64_t> check_chain_jacobian_norms(const Tensor& x, const std::vector<Tensor>& weights,
                                                const std::vector<Tensor>& biases, int64_t layers) {
  const Dtype dtype = check_dense(x, 2, "chain_jacobian_norms: x");
  STD_TORCH_CHECK(layers > 0, "chain_jacobian_norms: a chain needs at least one layer");
  const auto depth = static_cast<size_t>(layers);
  STD_TORCH_CHECK(!weights.empty() && weights.size() % depth == 0 && biases.size() == weights.size(),
                  "chain_jacobian_norms: ", weights.size(), " weights and ", biases.size(), " biases for chains of ",
                  layers, " layers");
  std::vector<int64_t> widths{x.size(1)};
  for (size_t i = 0; i < weights.size(); ++i) {
    const size_t l = i % depth;
    const std::string name = "chain_jacobian_norms: weight " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(weights[i], 2, name) == dtype, name, ": another dtype than x");
    if (i < depth) widths.push_back(weights[i].size(0));
    STD_TORCH_CHECK(weights[i].size(0) == widths[l + 1] && weights[i].size(1) == widths[l], name, ": expected ",
                    widths[l + 1], " x ", widths[l], ", got ", weights[i].size(0), " x ", weights[i].size(1));
    STD_TORCH_CHECK(weights[i].numel() > 0, name, ": is empty");
    if (biases[i].numel() == 0) continue;
    const std::string bias = "chain_jacobian_norms: bias " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(biases[i], 1, bias) == dtype, bias, ": another dtype than x");
    STD_TORCH_CHECK(biases[i].size(0) == widths[l + 1], bias, ": expected ", widths[l + 1], " values");
  }
  return widths;
}

#if !defined(LIPFAST_CHECKS_ONLY)
STABLE_TORCH_LIBRARY_FRAGMENT(lipfast, m) {
  // weights, biases: network by network, layer by layer; an empty bias is none. slopes: one per layer.
  m.def(
      "chain_jacobian_norms(Tensor x, Tensor[] weights, Tensor[] biases, float[] slopes) -> (Tensor spectral, "
      "Tensor frobenius)");
}
#endif

}  // namespace lipfast

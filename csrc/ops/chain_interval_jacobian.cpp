// chain_interval_jacobian: norms 1 and inf of a chain's interval Jacobian. Schema and argument checks.
#include "checks.h"

namespace lipfast {
namespace {

constexpr int64_t kMostUnits = int64_t{1} << 30;

// Slopes of n units: of all networks alike, or of each; or none.
void check_slopes(const Tensor& lower, const Tensor& upper, int64_t networks, int64_t n, const std::string& name) {
  STD_TORCH_CHECK((lower.numel() == 0) == (upper.numel() == 0), name, ": one end only");
  if (lower.numel() == 0) return;
  for (const Tensor& end : {lower, upper}) {
    STD_TORCH_CHECK(check_dense(end, 2, name) == Dtype::kFloat64, name, ": expected float64");
    STD_TORCH_CHECK((end.size(0) == 1 || end.size(0) == networks) && end.size(1) == n, name, ": expected 1 or ",
                    networks, " x ", n, ", got ", text(end));
  }
}

}  // namespace

int64_t check_chain_interval_jacobian(const std::vector<Tensor>& weights, const std::vector<Tensor>& errors,
                                      const std::vector<Tensor>& lower, const std::vector<Tensor>& upper,
                                      int64_t norm) {
  const std::string op = "chain_interval_jacobian";
  STD_TORCH_CHECK(lower.size() >= 2 && lower.size() == upper.size(), op, ": slopes of ", lower.size(), " and ",
                  upper.size(), " layers");
  STD_TORCH_CHECK(norm == 0 || norm == 1, op, ": unknown norm ", norm);
  const size_t maps = lower.size() - 1;
  STD_TORCH_CHECK(!weights.empty() && weights.size() % maps == 0, op, ": ", weights.size(), " weights for chains of ",
                  maps);
  STD_TORCH_CHECK(errors.empty() || errors.size() == weights.size(), op, ": errors of ", errors.size(), " of ",
                  weights.size(), " weights");
  const auto networks = static_cast<int64_t>(weights.size() / maps);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &weight = weights[i], &first = weights[i % maps];
    const std::string name = op + ": weight " + std::to_string(i);
    check_dense(weight, 2, name);
    STD_TORCH_CHECK(weight.numel() > 0 && weight.size(0) < kMostUnits && weight.size(1) < kMostUnits, name, ": is ",
                    text(weight), "; sides must be between 1 and 2^30");
    STD_TORCH_CHECK(weight.size(0) == first.size(0) && weight.size(1) == first.size(1), name, ": expected ",
                    text(first), ", got ", text(weight));
    if (i % maps > 0) {
      STD_TORCH_CHECK(weight.size(1) == weights[i - 1].size(0), name, ": expected ", weights[i - 1].size(0),
                      " columns, got ", weight.size(1));
    }
    if (errors.empty() || errors[i].numel() == 0) continue;
    const std::string error = op + ": error " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(errors[i], 2, error) == Dtype::kFloat64, error, ": expected float64");
    STD_TORCH_CHECK(errors[i].size(0) == weight.size(0) && errors[i].size(1) == weight.size(1), error, ": expected ",
                    text(weight), ", got ", text(errors[i]));
  }
  for (size_t i = 0; i <= maps; ++i) {
    const int64_t units = i == 0 ? weights[0].size(1) : weights[i - 1].size(0);
    check_slopes(lower[i], upper[i], networks, units, op + ": slopes " + std::to_string(i));
  }
  return networks;
}

// weights: network by network, map by map; errors: none, or one per weight, empty for an exact one. lower, upper: of
// the inputs and behind every map, (1 or networks, units) each, or empty. norm: 1, or 0 for the largest row. sums:
// (networks, maps), of the largest column (row) of each weight's magnitudes, as computed.
LIPFAST_SCHEMA(
    "chain_interval_jacobian(Tensor[] weights, Tensor[] errors, Tensor[] lower, Tensor[] upper, int norm) -> (Tensor "
    "norms, Tensor sums)")

}  // namespace lipfast

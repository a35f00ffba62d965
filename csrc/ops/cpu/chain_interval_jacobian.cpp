#include "../../kernels/cpu/chain_interval_jacobian.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../../kernels/rounding.h"
#include "../checks.h"
#include "threads.h"

namespace lipfast {
namespace {

struct Slopes {
  const double *low, *high;
};

// Of one network; (1, n) holds those of all.
Slopes slopes_of(const Tensor& lower, const Tensor& upper, int64_t network) {
  if (lower.numel() == 0) return {nullptr, nullptr};
  const auto row = [&](const Tensor& end) {
    return values<double>(end) + (end.size(0) == 1 ? 0 : network) * end.size(1);
  };
  return {row(lower), row(upper)};
}

// The largest sum of columns, rounded up; sums[block * inputs + column].
double largest_column(const double* sums, int64_t blocks, int64_t inputs, int64_t outputs) {
  double largest = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[block * inputs + k];
    if (!(sum < INFINITY)) return INFINITY;
    largest = std::max(largest, sum * (1 + 2 * gamma(outputs + 4)));
  }
  return largest;
}

std::tuple<Tensor, Tensor> chain_interval_jacobian_cpu(std::vector<Tensor> weights, std::vector<Tensor> errors,
                                                       std::vector<Tensor> lower, std::vector<Tensor> upper,
                                                       int64_t norm) {
  const int64_t networks = check_chain_interval_jacobian(weights, errors, lower, upper, norm);
  const size_t count = lower.size() - 1;
  std::vector<IntervalMap> maps;
  std::vector<IntervalChain> chains;
  int64_t widest = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const bool exact = errors.empty() || errors[i].numel() == 0;
    const Slopes behind = slopes_of(lower[i % count + 1], upper[i % count + 1], static_cast<int64_t>(i / count));
    maps.push_back({weight.data_ptr(), dtype_of(weight), weight.size(0), weight.size(1),
                    exact ? nullptr : values<double>(errors[i]), behind.low, behind.high});
    widest = std::max({widest, weight.size(0), weight.size(1)});
  }
  for (int64_t network = 0; network < networks; ++network) {
    const Slopes before = slopes_of(lower[0], upper[0], network);
    chains.push_back({maps.data() + static_cast<size_t>(network) * count, static_cast<int64_t>(count), before.low,
                      before.high, widest});
  }
  const int64_t outputs = maps[count - 1].rows, inputs = maps[0].columns;
  const int64_t blocks = (outputs + kIntervalRows - 1) / kIntervalRows, kept = norm == 1 ? inputs : 1;
  std::vector<double> sums(static_cast<size_t>(networks * blocks * kept));
  const ChainIntervalJacobianKernel kernel = chain_interval_jacobian_kernel();
  const Tensor& like = weights[0];
  const auto total = static_cast<int64_t>(weights.size());
  Tensor layers = torch::stable::new_empty(like, {networks, static_cast<int64_t>(count)}, ScalarType::Double);
  for_each_item(
      networks * blocks + total, [&] { return Workspace(kernel.workspace(chains[0])); },
      [&](int64_t item, const Workspace& workspace) {
        if (item >= networks * blocks) {
          const int64_t map = item - networks * blocks;
          mutable_values<double>(layers)[map] =
              kernel.largest_sum(maps[static_cast<size_t>(map)], norm == 1, workspace.as<double>());
          return;
        }
        const int64_t first = item % blocks * kIntervalRows, rows = std::min(kIntervalRows, outputs - first);
        kernel.rows(chains[static_cast<size_t>(item / blocks)], first, rows, norm == 1, sums.data() + item * kept,
                    workspace.as<double>());
      });
  Tensor norms = torch::stable::new_empty(like, {networks}, ScalarType::Double);
  const StandardArithmetic arithmetic;
  for (int64_t network = 0; network < networks; ++network) {
    const double* own = sums.data() + network * blocks * kept;
    mutable_values<double>(norms)[network] =
        norm == 1 ? largest_column(own, blocks, inputs, outputs) : *std::max_element(own, own + blocks);
  }
  return {norms, layers};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) {
  m.impl("chain_interval_jacobian", TORCH_BOX(&chain_interval_jacobian_cpu));
}

}  // namespace lipfast

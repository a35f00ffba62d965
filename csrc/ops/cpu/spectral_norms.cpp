#include "../../kernels/cpu/spectral_norms.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "../checks.h"
#include "threads.h"

namespace lipfast {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs spectral_norms_cpu(std::vector<Tensor> matrices, std::vector<Tensor> start, bool certify, double rtol,
                           int64_t max_passes, bool power, int64_t seed, int64_t memory) {
  check_spectral_norms(matrices, start);
  const auto count = static_cast<int64_t>(matrices.size());
  std::vector<SpectralProblem> problems;
  std::vector<int64_t> right_offset{0}, left_offset{0};
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& matrix = matrices[i];
    const bool given = !start.empty() && start[i].numel() > 0;
    problems.push_back({matrix.data_ptr(), dtype_of(matrix), matrix.size(0), matrix.size(1),
                        given ? values<double>(start[i]) : nullptr, static_cast<uint64_t>(seed), rtol,
                        static_cast<int32_t>(max_passes), power ? SpectralMethod::kPower : SpectralMethod::kLanczos,
                        certify, memory, nullptr});
    right_offset.push_back(right_offset.back() + matrix.size(1));
    left_offset.push_back(left_offset.back() + matrix.size(0));
  }
  const Tensor& like = matrices[0];
  const auto vector = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(like, {size}, type); };
  Tensor lower = vector(count, ScalarType::Double), upper = vector(count, ScalarType::Double);
  Tensor passes = vector(count, ScalarType::Long), method = vector(count, ScalarType::Long);
  Tensor right = vector(right_offset.back(), ScalarType::Double), left = vector(left_offset.back(), ScalarType::Double);

  // The most expensive first, so that no thread is left with a large one at the end.
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](int64_t i) {
    const double rows = static_cast<double>(problems[i].rows), cols = static_cast<double>(problems[i].cols);
    return rows * cols * std::min(rows, cols);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });

  const auto solve = [&](int64_t i, const Workspace& workspace) {
    SpectralResult result{};
    result.right = mutable_values<double>(right) + right_offset[i];
    result.left = mutable_values<double>(left) + left_offset[i];
    spectral_norms_kernel(problems[i].dtype)(problems[i], result, workspace.as<double>());
    mutable_values<double>(lower)[i] = result.lower;
    mutable_values<double>(upper)[i] = result.upper;
    mutable_values<int64_t>(passes)[i] = result.passes;
    mutable_values<int64_t>(method)[i] = result.finite ? static_cast<int64_t>(result.upper_method) : -1;
  };
  const auto workspace_for = [&](int64_t i) {
    return spectral_norms_workspace(problems[i]) * static_cast<int64_t>(sizeof(double));
  };
  // Large matrices one by one, each with all threads; then the others, each on one.
  const auto middle = std::stable_partition(order.begin(), order.end(),
                                            [&](int64_t i) { return spectral_norms_is_large(problems[i]); });
  for (auto i = order.begin(); i != middle; ++i) {
    problems[*i].parallel = &kThreads;
    const StandardArithmetic arithmetic;
    solve(*i, Workspace(workspace_for(*i)));
  }
  int64_t largest = 0;
  for (auto i = middle; i != order.end(); ++i) largest = std::max(largest, workspace_for(*i));
  for_each_item(
      order.end() - middle, [&] { return Workspace(largest); },
      [&](int64_t item, const Workspace& workspace) { solve(middle[item], workspace); });
  return {lower, upper, passes, method, right, left};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) { m.impl("spectral_norms", TORCH_BOX(&spectral_norms_cpu)); }

}  // namespace lipfast

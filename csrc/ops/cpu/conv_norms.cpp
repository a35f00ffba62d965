#include "../../kernels/cpu/conv_norms.h"

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "threads.h"

namespace lipfast {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Kernels whose cells are worth sharing among threads; the others are one thread's each.
bool is_large(const ConvProblem& problem) {
  const bool has_cells = problem.max_cells > 0 || problem.start == nullptr;
  return has_cells && problem.shape.rows >= 48;
}

ConvProblem problem_of(const Tensor& taps, const Tensor& start, const int64_t* grid) {
  ConvProblem problem{};
  problem.taps = taps.data_ptr();
  problem.dtype = dtype_of(taps);
  problem.groups = taps.size(0);
  problem.shape = {taps.size(4), taps.size(5), {taps.size(1), taps.size(2), taps.size(3)}};
  problem.on_grid = grid[0] > 0 || grid[1] > 0 || grid[2] > 0;
  for (int64_t a = 0; a < 3; ++a) {
    problem.lattice.axes += problem.shape.sizes[a] > 1;
    problem.lattice.denominators[a] = problem.on_grid ? std::max<int64_t>(grid[a], 1) : kCycle;
  }
  problem.start = start.numel() > 0 ? values<double>(start) : nullptr;
  return problem;
}

Outputs conv_norms_cpu(std::vector<Tensor> taps, std::vector<Tensor> start, std::vector<int64_t> grid, double rtol,
                       int64_t max_cells, int64_t seed, int64_t memory) {
  check_conv_norms(taps, start, grid);
  const auto count = static_cast<int64_t>(taps.size());
  std::vector<ConvProblem> problems;
  std::vector<int64_t> left_offset{0}, right_offset{0};
  for (size_t i = 0; i < taps.size(); ++i) {
    ConvProblem problem = problem_of(taps[i], start[i], &grid[3 * i]);
    problem.rtol = rtol;
    problem.max_cells = max_cells;
    problem.seed = static_cast<uint64_t>(seed);
    problem.memory = memory;
    problems.push_back(problem);
    left_offset.push_back(left_offset.back() + 2 * problem.shape.rows);
    right_offset.push_back(right_offset.back() + 2 * problem.shape.cols);
  }
  const Tensor& like = taps[0];
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, type);
  };
  Tensor lower = make({count}, ScalarType::Double), upper = make({count}, ScalarType::Double);
  Tensor frequency = make({count, 3}, ScalarType::Double), group = make({count}, ScalarType::Long);
  Tensor cells = make({count}, ScalarType::Long), method = make({count}, ScalarType::Long);
  Tensor left = make({left_offset.back()}, ScalarType::Double), right = make({right_offset.back()}, ScalarType::Double);
  const auto solve = [&](int64_t i) {
    ConvResult result{};
    result.left = mutable_values<double>(left) + left_offset[i];
    result.right = mutable_values<double>(right) + right_offset[i];
    conv_norms(problems[i], result);
    mutable_values<double>(lower)[i] = result.lower;
    mutable_values<double>(upper)[i] = result.upper;
    std::copy_n(result.frequency, 3, mutable_values<double>(frequency) + 3 * i);
    mutable_values<int64_t>(group)[i] = result.group;
    mutable_values<int64_t>(cells)[i] = result.cells;
    mutable_values<int64_t>(method)[i] = result.finite ? static_cast<int64_t>(result.method) : -1;
  };
  // Large kernels one by one, each with all threads; then the others, each on one.
  std::vector<int64_t> small;
  for (int64_t i = 0; i < count; ++i) {
    if (count > 1 && !is_large(problems[i])) {
      small.push_back(i);
      continue;
    }
    problems[i].parallel = &kThreads;
    const StandardArithmetic arithmetic;
    solve(i);
  }
  for_each_item(
      static_cast<int64_t>(small.size()), [] { return Workspace(1); },
      [&](int64_t item, const Workspace&) { solve(small[static_cast<size_t>(item)]); });
  return {lower, upper, frequency, group, cells, method, left, right};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) { m.impl("conv_norms", TORCH_BOX(&conv_norms_cpu)); }

}  // namespace lipfast

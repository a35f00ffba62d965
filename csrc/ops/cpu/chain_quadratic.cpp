#include "../../kernels/cpu/chain_quadratic.h"

#include <tuple>

#include "../checks.h"
#include "interrupts.h"
#include "threads.h"

namespace lipfast {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The addresses that one network's problem and result are made of.
struct Network {
  std::vector<const void*> weights;
  std::vector<const double*> errors, means, products, start;
  std::vector<double*> multipliers, logs;
  std::vector<int32_t*> exponents;
};

// What is counted of one network, as steps of its kernel.
struct Counted {
  Interrupts* of_all;
  int64_t steps;
  static bool asked(void* argument) {
    auto* own = static_cast<Counted*>(argument);
    ++own->steps;
    own->of_all->count(1);
    return own->of_all->stop();
  }
};

Outputs chain_quadratic_cpu(std::vector<Tensor> weights, std::vector<Tensor> errors, std::vector<Tensor> means,
                            std::vector<Tensor> products, std::vector<Tensor> start, int64_t layers,
                            int64_t evaluations) {
  const std::vector<int64_t> sizes =
      check_chain_quadratic(weights, errors, means, products, start, layers, evaluations);
  const int64_t networks = static_cast<int64_t>(weights.size()) / layers;
  int64_t units = 0;
  for (int64_t i = 1; i < layers; ++i) units += sizes[i];
  const auto empty = [&](int64_t columns, ScalarType type) {
    return torch::stable::new_empty(weights[0], {networks, columns}, type);
  };
  Tensor numbers = empty(3, ScalarType::Double), evaluated = empty(1, ScalarType::Int);
  Tensor multipliers = empty(units, ScalarType::Double), logs = empty(units, ScalarType::Double);
  Tensor unit_exponents = empty(units, ScalarType::Int), weight_exponents = empty(layers, ScalarType::Int);

  const auto addresses_of = [&](int64_t network) {
    Network of;
    const auto row = [&](const Tensor& tensor) {
      return values<double>(tensor) + (tensor.dim() == 2 ? network * tensor.size(1) : 0);
    };
    for (int64_t i = 0, begin = network * units; i < layers; ++i) {
      const auto at = static_cast<size_t>(network * layers + i);
      of.weights.push_back(weights[at].data_ptr());
      of.errors.push_back(errors.empty() || errors[at].numel() == 0 ? nullptr : values<double>(errors[at]));
      if (i + 1 == layers) break;
      of.means.push_back(row(means[i]));
      of.products.push_back(row(products[i]));
      if (!start.empty()) of.start.push_back(row(start[i]));
      of.multipliers.push_back(mutable_values<double>(multipliers) + begin);
      of.logs.push_back(mutable_values<double>(logs) + begin);
      of.exponents.push_back(mutable_values<int32_t>(unit_exponents) + begin);
      begin += sizes[i + 1];
    }
    return of;
  };
  const auto problem_of = [&](const Network& of, const Parallel* parallel, const Stop* stop) {
    return QuadraticProblem{layers,
                            sizes.data(),
                            of.weights.data(),
                            of.errors.data(),
                            of.means.data(),
                            of.products.data(),
                            start.empty() ? nullptr : of.start.data(),
                            evaluations,
                            parallel,
                            stop};
  };
  const ChainQuadraticKernel kernel = chain_quadratic_kernel(dtype_of(weights[0]));
  // Sweeps of the search, its start and the certificate; a network may take fewer, or more.
  const int64_t steps = (evaluations + 2) * (layers - 1);
  Interrupts interrupts(static_cast<double>(steps * networks));
  const auto solve = [&](int64_t network, const Workspace& workspace, const Parallel* parallel) {
    const Network of = addresses_of(network);
    QuadraticResult result{};
    result.multipliers = of.multipliers.data();
    result.logs = of.logs.data();
    result.unit_exponents = of.exponents.data();
    result.weight_exponents = mutable_values<int32_t>(weight_exponents) + network * layers;
    Counted counted{&interrupts, 0};
    const Stop stop{&Counted::asked, &counted};
    if (!interrupts.stop()) kernel(problem_of(of, parallel, &stop), result, workspace.as<void>());
    interrupts.count(steps - counted.steps);
    double* row = mutable_values<double>(numbers) + 3 * network;
    row[0] = result.log_value;
    row[1] = result.value;
    row[2] = result.square;
    mutable_values<int32_t>(evaluated)[network] = result.evaluations;
  };
  const Network first = addresses_of(0);
  const QuadraticProblem problem = problem_of(first, nullptr, nullptr);
  const int64_t bytes = chain_quadratic_workspace(problem);
  if (chain_quadratic_is_large(problem)) {  // one by one, each with all threads
    const StandardArithmetic arithmetic;
    const Workspace workspace(bytes);
    for (int64_t network = 0; network < networks; ++network) solve(network, workspace, &kThreads);
  } else {
    for_each_item(
        networks, [bytes] { return Workspace(bytes); },
        [&](int64_t network, const Workspace& workspace) { solve(network, workspace, nullptr); },
        [&] { return Interrupts::Presence(interrupts); });
  }
  interrupts.check("chain_quadratic");
  return {numbers, evaluated, multipliers, logs, unit_exponents, weight_exponents};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) { m.impl("chain_quadratic", TORCH_BOX(&chain_quadratic_cpu)); }

}  // namespace lipfast

#include "../../kernels/cpu/chain_secants.h"

#include <tuple>

#include "../checks.h"
#include "threads.h"

namespace lipfast {
namespace {

// A checked chain with the addresses of its weights.
struct Networks {
  Networks(SecantStages checked, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases)
      : kernel(chain_secants_kernel(dtype_of(weights[0]))),
        stages(std::move(checked)),
        weight_data(addresses(weights)),
        bias_data(addresses(biases)),
        count(static_cast<int64_t>(weights.size()) / stages.affine) {
    chain = {static_cast<int64_t>(stages.stages.size()),
             stages.stages.data(),
             stages.affine,
             stages.inputs,
             stages.outputs,
             stages.widest,
             weight_data.data(),
             bias_data.data()};
  }
  Networks(const Networks&) = delete;
  Networks& operator=(const Networks&) = delete;

  // body(network, workspace) for each, with room for this number of points.
  template <class Body>
  void for_each(int64_t points, const Body& body) const {
    const int64_t bytes = kernel.workspace(chain, points) + 64;
    for_each_item(
        count, [bytes] { return Workspace(bytes); },
        [&](int64_t network, const Workspace& workspace) { body(network, workspace.as<double>()); });
  }

  const ChainSecantsKernel kernel;
  const SecantStages stages;
  const std::vector<const void*> weight_data, bias_data;
  const int64_t count;
  SecantChain chain;
};

Tensor jacobians_cpu(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<int64_t> stages,
                     std::vector<double> parameters) {
  const Networks networks(check_chain_secants(x, 2, weights, biases, stages, parameters), weights, biases);
  const SecantChain& chain = networks.chain;
  Tensor result = torch::stable::new_empty(x, {networks.count, chain.outputs, chain.inputs});
  networks.for_each(1, [&](int64_t n, double* workspace) {
    networks.kernel.jacobian(chain, n, values<double>(x) + n * chain.inputs,
                             mutable_values<double>(result) + n * chain.outputs * chain.inputs, workspace);
  });
  return result;
}

Tensor kinks_cpu(Tensor x, Tensor direction, std::vector<Tensor> weights, std::vector<Tensor> biases,
                 std::vector<int64_t> stages, std::vector<double> parameters) {
  const Networks networks(check_chain_secants(x, 2, weights, biases, stages, parameters), weights, biases);
  const SecantChain& chain = networks.chain;
  check_chain_secants(direction, 2, weights, biases, stages, parameters);
  Tensor reach = torch::stable::new_empty(x, {networks.count, 2});
  networks.for_each(1, [&](int64_t n, double* workspace) {
    networks.kernel.kinks(chain, n, values<double>(x) + n * chain.inputs, values<double>(direction) + n * chain.inputs,
                          mutable_values<double>(reach) + 2 * n, workspace);
  });
  return reach;
}

std::tuple<Tensor, Tensor> enclosures_cpu(Tensor points, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                          std::vector<int64_t> stages, std::vector<double> parameters) {
  const Networks networks(check_chain_secants(points, 3, weights, biases, stages, parameters), weights, biases);
  const SecantChain& chain = networks.chain;
  const int64_t count = points.size(1), size = count * chain.outputs;
  Tensor found = torch::stable::new_empty(points, {networks.count, count, chain.outputs});
  Tensor errors = torch::stable::new_empty(points, {networks.count, count, chain.outputs});
  networks.for_each(count, [&](int64_t n, double* workspace) {
    networks.kernel.enclose(chain, n, values<double>(points) + n * count * chain.inputs, count,
                            mutable_values<double>(found) + n * size, mutable_values<double>(errors) + n * size,
                            workspace);
  });
  return {found, errors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) {
  m.impl("chain_secants_jacobians", TORCH_BOX(&jacobians_cpu));
  m.impl("chain_secants_kinks", TORCH_BOX(&kinks_cpu));
  m.impl("chain_secants_enclosures", TORCH_BOX(&enclosures_cpu));
}

}  // namespace lipfast

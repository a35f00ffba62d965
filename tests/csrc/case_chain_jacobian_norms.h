#pragma once

#include "chain_jacobian_norms.cuh"

#include <memory>

#include "harness_cases.h"

namespace lipfast {
namespace {

template <class T>
void run_chain_jacobian_norms_as(Input& input, Output& output, cuda::ChainLaunch chain, Dtype dtype, unsigned grid,
                                 uint64_t seed, int64_t offset) {
  const std::vector<T> x = input.array<T>(chain.batch * chain.widths[0]);
  std::vector<std::vector<T>> kept;
  for (int i = 0; i < chain.networks * chain.layers; ++i) {
    const int64_t inputs = chain.widths[i % chain.layers], outputs = chain.widths[i % chain.layers + 1];
    kept.push_back(input.array<T>(outputs * inputs, offset));
    chain.weights[i] = kept.back().data() + offset;
    kept.push_back(input.array<T>(input.number() != 0 ? outputs : 0));
    chain.biases[i] = kept.back().empty() ? nullptr : kept.back().data();
  }
  std::vector<T> spectral(chain.networks * chain.batch), frobenius(chain.networks * chain.batch);
  chain.x = x.data();
  chain.spectral = spectral.data();
  chain.frobenius = frobenius.data();
  const cuda::ChainLayout layout(chain, dtype);
  const int64_t outputs = chain.widths[chain.layers], inputs = chain.widths[0];
  const int64_t reduce = grid * cuda::ReduceLayout(outputs, inputs).global();
  const std::unique_ptr<char[]> workspace(new char[grid * layout.bytes()]);
  const std::unique_ptr<double[]> reduce_workspace(new double[reduce]);
  std::memset(workspace.get(), cuda_on_cpu::kPoison, grid * layout.bytes());
  const cuda_on_cpu::Launch launch{grid, cuda::kChainThreads,
                                   static_cast<size_t>(cuda::chain_shared<T>(outputs, inputs)), seed};
  cuda_on_cpu::run(launch, [&] {
    if (cuda::chain_rows(outputs) == 4) {
      cuda::chain_jacobian_norms_kernel<T, 4>(chain, layout, reduce_workspace.get(), workspace.get());
    } else {
      cuda::chain_jacobian_norms_kernel<T, 12>(chain, layout, reduce_workspace.get(), workspace.get());
    }
  });
  output.array(spectral);
  output.array(frobenius);
}

void run_chain_jacobian_norms(Input& input, Output& output) {
  cuda::ChainLaunch chain{};
  const auto dtype = static_cast<Dtype>(input.number());
  chain.batch = input.number();
  chain.networks = static_cast<int32_t>(input.number());
  chain.layers = static_cast<int32_t>(input.number());
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  const int64_t offset = input.number();
  for (int l = 0; l <= chain.layers; ++l) chain.widths[l] = static_cast<int32_t>(input.number());
  for (int l = 0; l < chain.layers; ++l) chain.slopes[l] = input.array<double>(1)[0];
  dtype == Dtype::kFloat32 ? run_chain_jacobian_norms_as<float>(input, output, chain, dtype, grid, seed, offset)
                           : run_chain_jacobian_norms_as<double>(input, output, chain, dtype, grid, seed, offset);
}

const RegisterCase registered_chain_jacobian_norms("chain_jacobian_norms", run_chain_jacobian_norms);

}  // namespace
}  // namespace lipfast

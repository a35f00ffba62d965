#pragma once

#include "chain_jacobian_norms.cuh"

#include <memory>

#include "harness_cases.h"

namespace lipfast {
namespace {

struct ChainCut {
  int64_t warps, rounds;
  bool dense;  // whether tensor cores may be used
};

template <class T, int kRows, bool kDense>
void run_chain_kernel(const cuda::ChainLaunch& chain, const cuda::ChainLayout& layout, char* workspace, unsigned grid,
                      uint64_t seed) {
  const int64_t outputs = chain.widths[chain.layers], inputs = chain.widths[0];
  const std::unique_ptr<double[]> reduce(new double[grid * cuda::ReduceLayout(outputs, inputs).global()]);
  const int64_t shared =
      cuda::ChainShared<T>{layout.warps, kRows, cuda::reduction_bytes<kRows, kDense>(outputs, inputs, layout.warps),
                           kDense}
          .bytes();
  const cuda_on_cpu::Launch launch{grid, static_cast<unsigned>(32 * layout.warps), static_cast<size_t>(shared), seed};
  cuda_on_cpu::run(
      launch, [&] { cuda::chain_jacobian_norms_kernel<T, kRows, kDense>(chain, layout, reduce.get(), workspace); });
}

template <class T>
void run_chain_jacobian_norms_as(Input& input, Output& output, cuda::ChainLaunch chain, Dtype dtype, unsigned grid,
                                 uint64_t seed, int64_t offset, ChainCut cut) {
  const std::vector<T> x = input.array<T>(chain.batch * chain.widths[0]);
  std::vector<std::vector<T>> kept;
  for (int i = 0; i < chain.networks * chain.layers; ++i) {
    const int64_t inputs = chain.widths[i % chain.layers], outputs = chain.widths[i % chain.layers + 1];
    kept.push_back(input.array<T>(outputs * inputs, offset));
    chain.weights.at[i] = kept.back().data() + offset;
    kept.push_back(input.array<T>(input.number() != 0 ? outputs : 0));
    chain.biases.at[i] = kept.back().empty() ? nullptr : kept.back().data();
  }
  std::vector<T> spectral(chain.networks * chain.batch), frobenius(chain.networks * chain.batch);
  chain.x = x.data();
  chain.spectral = spectral.data();
  chain.frobenius = frobenius.data();
  const int64_t outputs = chain.widths[chain.layers];
  const int rows = cuda::chain_rows(outputs);
  cuda::ChainLayout layout(chain, dtype, cut.warps, cut.rounds);
  layout.dense = layout.dense && cut.dense;
  const std::unique_ptr<char[]> workspace(new char[grid * layout.bytes()]);
  std::memset(workspace.get(), cuda_on_cpu::kPoison, grid * layout.bytes());
  const auto run = [&]<int kRows>() {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (layout.dense) return run_chain_kernel<T, kRows, true>(chain, layout, workspace.get(), grid, seed);
    }
    run_chain_kernel<T, kRows, false>(chain, layout, workspace.get(), grid, seed);
  };
  if (rows == 4) {
    run.template operator()<4>();
  } else if (rows == 8) {
    run.template operator()<8>();
  } else {
    run.template operator()<10>();
  }
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
  ChainCut cut{};
  cut.warps = input.number();
  cut.rounds = input.number();
  cut.dense = input.number() != 0;
  for (int l = 0; l <= chain.layers; ++l) chain.widths[l] = static_cast<int32_t>(input.number());
  for (int l = 0; l <= chain.layers; ++l) chain.starts[l] = static_cast<uint8_t>(input.number());
  for (int a = 0; a < chain.starts[chain.layers]; ++a) {
    chain.activations[a].function = static_cast<Activation>(input.number());
  }
  for (int a = 0; a < chain.starts[chain.layers]; ++a) {
    const std::vector<double> parameters = input.array<double>(2);
    for (int i = 0; i < 2; ++i) chain.activations[a].parameters[i] = parameters[i];
  }
  dtype == Dtype::kFloat32 ? run_chain_jacobian_norms_as<float>(input, output, chain, dtype, grid, seed, offset, cut)
                           : run_chain_jacobian_norms_as<double>(input, output, chain, dtype, grid, seed, offset, cut);
}

const RegisterCase registered_chain_jacobian_norms("chain_jacobian_norms", run_chain_jacobian_norms);

}  // namespace
}  // namespace lipfast

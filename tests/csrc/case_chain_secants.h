#pragma once

#include "chain_secants.cuh"

#include <memory>

#include "harness_cases.h"

namespace lipfast {
namespace {

// Networks one after another in one array, so that tables are spaced, or each in its own.
template <class T>
struct SecantWeights {
  std::vector<std::vector<T>> kept;

  SecantWeights(Input& input, cuda::SecantChains& chains, bool spaced) {
    chains.weights.spaced = chains.biases.spaced = spaced;
    const int64_t together = spaced ? chains.networks : 1, times = spaced ? 1 : chains.networks;
    for (int64_t i = 0; i < times * chains.layers; ++i) {
      const int64_t l = i % chains.layers, rows = chains.widths[l + 1], size = rows * chains.widths[l];
      set(chains.weights, i, l, input.array<T>(together * size), size);
      const bool given = input.number() != 0;
      set(chains.biases, i, l, input.array<T>(given ? together * rows : 0), given ? rows : 0);
    }
  }

  void set(cuda::ChainMaps& maps, int64_t i, int64_t l, std::vector<T> values, int64_t step) {
    kept.push_back(std::move(values));
    maps.at[i] = kept.back().empty() ? nullptr : kept.back().data();
    if (maps.spaced) maps.at[cuda::kMaxChainMaps / 2 + l] = reinterpret_cast<const void*>(sizeof(T) * step);
  }
};

std::unique_ptr<double[]> poisoned(int64_t doubles) {
  std::unique_ptr<double[]> made(new double[doubles]);
  std::memset(made.get(), cuda_on_cpu::kPoison, 8 * doubles);
  return made;
}

template <class T>
void run_chain_secants_as(Input& input, Output& output, cuda::SecantChains chains, bool spaced, unsigned grid,
                          uint64_t seed) {
  const SecantWeights<T> weights(input, chains, spaced);
  const int64_t inputs = chains.widths[0];
  const auto launch = [&](size_t shared) { return cuda_on_cpu::Launch{grid, cuda::kSecantThreads, shared, seed}; };
  const bool quotients_only = input.number() != 0;
  cuda::SecantLines lines{};
  lines.fractions = static_cast<int32_t>(input.number());
  lines.count = static_cast<int32_t>(input.number());
  const std::vector<double> steps = input.array<double>(lines.count);
  for (int s = 0; s < lines.count; ++s) lines.steps[s] = steps[s];
  lines.longest = 100;
  const int64_t count = 1 + 2 * lines.count;
  const std::vector<double> given = input.array<double>(chains.networks * (quotients_only ? count : 1) * inputs);
  std::vector<double> points(quotients_only ? given : std::vector<double>(chains.networks * count * inputs));
  if (!quotients_only) {
    lines.x = given.data();
    lines.points = points.data();
    const cuda::LinesLayout layout(chains);
    const auto workspace = poisoned(grid * layout.doubles());
    cuda_on_cpu::run(launch(sizeof(cuda::LineBuffers)),
                     [&] { cuda::secant_lines_kernel<T>(chains, layout, lines, workspace.get()); });
  }
  std::vector<double> found(2 * chains.networks), ends(2 * chains.networks * inputs);
  const cuda::SecantQuotients quotients{points.data(), lines.count, 0.99, found.data(), ends.data()};
  const auto workspace = poisoned(grid * cuda::enclosure_doubles(chains.widest));
  cuda_on_cpu::run(launch(sizeof(cuda::EnclosureShared)),
                   [&] { cuda::secant_quotients_kernel<T>(chains, quotients, workspace.get()); });
  output.array(points);
  output.array(found);
  output.array(ends);
}

void run_chain_secants(Input& input, Output& output) {
  cuda::SecantChains chains{};
  const auto dtype = static_cast<Dtype>(input.number());
  chains.networks = static_cast<int32_t>(input.number());
  chains.layers = static_cast<int32_t>(input.number());
  chains.norm = static_cast<int32_t>(input.number());
  const bool spaced = input.number() != 0;
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  for (int l = 0; l <= chains.layers; ++l) {
    chains.widths[l] = static_cast<int32_t>(input.number());
    chains.widest = larger(chains.widest, chains.widths[l]);
  }
  for (int l = 0; l <= chains.layers + 1; ++l) chains.starts[l] = static_cast<uint8_t>(input.number());
  for (int a = 0; a < chains.starts[chains.layers + 1]; ++a) {
    chains.activations[a].leaky = input.number() != 0;
    chains.activations[a].limited = input.number() != 0;
    const std::vector<double> numbers = input.array<double>(3);
    chains.activations[a].low = numbers[0];
    chains.activations[a].high = numbers[1];
    chains.activations[a].slope = numbers[2];
  }
  dtype == Dtype::kFloat32 ? run_chain_secants_as<float>(input, output, chains, spaced, grid, seed)
                           : run_chain_secants_as<double>(input, output, chains, spaced, grid, seed);
}

const RegisterCase registered_chain_secants("chain_secants", run_chain_secants);

}  // namespace
}  // namespace lipfast

#pragma once

#include "spectral_norms.cuh"
#include "spectral_resident.cuh"

#include <memory>

#include "harness_cases.h"

namespace lipfast {
namespace {

void run_spectral_norms(Input& input, Output& output) {
  const int64_t count = input.number();
  cuda::SpectralOptions options{};
  options.max_passes = static_cast<int32_t>(input.number());
  options.power = input.number() != 0;
  options.certify = input.number() != 0;
  options.seed = static_cast<uint64_t>(input.number());
  const auto grid = static_cast<unsigned>(input.number()), block = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  const int64_t item_bytes = input.number(), resident_shared = input.number();  // 0: the grid shares all matrices
  const bool together = input.number() != 0;                                    // all matrices of a type in one array
  const std::vector<int64_t> shapes = input.array<int64_t>(4 * count);  // dtype, rows, cols, whether a start follows
  options.tolerance = input.array<double>(1)[0];
  std::vector<std::vector<float>> singles(count);
  std::vector<std::vector<double>> doubles(count), starts(count);
  std::vector<float> all_singles;
  std::vector<double> all_doubles;
  std::vector<size_t> begins(count);
  cuda::SpectralPlan plan;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t *shape = &shapes[4 * i], size = shape[1] * shape[2];
    const bool single = shape[0] == 0;
    if (single) {
      singles[i] = input.array<float>(size);
    } else {
      doubles[i] = input.array<double>(size);
    }
    if (shape[3] != 0) starts[i] = input.array<double>(shape[2]);
    begins[i] = single ? all_singles.size() : all_doubles.size();
    all_singles.insert(all_singles.end(), singles[i].begin(), singles[i].end());
    all_doubles.insert(all_doubles.end(), doubles[i].begin(), doubles[i].end());
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* shape = &shapes[4 * i];
    const void* data = shape[0] == 0 ? static_cast<const void*>(singles[i].data()) : doubles[i].data();
    if (together) data = shape[0] == 0 ? static_cast<const void*>(&all_singles[begins[i]]) : &all_doubles[begins[i]];
    plan.add(data, static_cast<Dtype>(shape[0]), shape[1], shape[2], shape[3] != 0 ? starts[i].data() : nullptr,
             resident_shared > 0, item_bytes, 1);
  }
  const std::unique_ptr<char[]> workspace(new char[plan.bytes()]);
  std::memset(workspace.get(), cuda_on_cpu::kPoison, plan.bytes());
  cuda::SpectralLaunch p = plan.launch(workspace.get());
  p.options = options;
  std::vector<double> lower(count), upper(count), right(plan.right), left(plan.left);
  std::vector<int64_t> passes(count), method(count);
  p.out = {lower.data(), upper.data(), passes.data(), method.data(), right.data(), left.data()};
  const std::vector<cuda::SpectralChunk> chunks = plan.chunks();
  for (const cuda::SpectralChunk& chunk : chunks) {
    cuda_on_cpu::run({grid, 64, 0, seed}, [&] { cuda::spectral_table_kernel(chunk, p); });
  }
  for (int32_t size = 0; size < 2; ++size) {
    if (plan.resident[size] == 0) continue;
    const auto shared = static_cast<size_t>(resident_shared);
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(grid, plan.resident[size]));
    cuda_on_cpu::run({blocks, block, shared, seed},
                     [&] { cuda::spectral_resident_kernel(p, {size, resident_shared}); });
  }
  if (p.items > 0) {
    cuda_on_cpu::run({grid, block, sizeof(cuda::SpectralShared), seed, true}, [&] { cuda::spectral_norms_kernel(p); });
  }
  output.array(lower);
  output.array(upper);
  output.array(passes);
  output.array(method);
  output.array(right);
  output.array(left);
  output.array(std::vector<int64_t>{static_cast<int64_t>(chunks.size())});
}

const RegisterCase registered_spectral_norms("spectral_norms", run_spectral_norms);

}  // namespace
}  // namespace lipfast

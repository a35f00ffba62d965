#pragma once

#include "hermitian_residual.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

// As long as the kernel may read, and aligned as its pairs are.
std::vector<cuda::Complex> complex_array(Input& input, int64_t size) {
  const std::vector<double> parts = input.array<double>(2 * size);
  std::vector<cuda::Complex> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = {parts[2 * i], parts[2 * i + 1]};
  return values;
}

void run_hermitian_residual(Input& input, Output& output) {
  cuda::HermitianResidualParams p{};
  p.batch = input.number();
  p.side = input.number();
  p.length = input.number();
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  const auto hermitian = complex_array(input, p.batch * p.side * p.side);
  const auto matrices = complex_array(input, p.batch * p.side * p.length);
  const auto factors = complex_array(input, p.batch * p.side * p.side);
  const int64_t tiles = cuda::residual_tiles(p.side);
  std::vector<double> out(2 * p.batch * tiles);
  p.hermitian = reinterpret_cast<const double*>(hermitian.data());
  p.matrices = reinterpret_cast<const double*>(matrices.data());
  p.factors = reinterpret_cast<const double*>(factors.data());
  p.out = out.data();
  cuda_on_cpu::run({grid, cuda::kTileThreads, sizeof(cuda::ResidualShared<cuda::Complex>), seed},
                   [&] { cuda::hermitian_residual_kernel(p, tiles); });
  output.array(out);
}

const RegisterCase registered_hermitian_residual("hermitian_residual", run_hermitian_residual);

}  // namespace
}  // namespace lipfast

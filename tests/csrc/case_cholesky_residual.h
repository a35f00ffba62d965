#pragma once

#include "cholesky_residual.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

void run_cholesky_residual(Input& input, Output& output) {
  cuda::ResidualParams p{};
  p.batch = input.number();
  p.side = input.number();
  p.length = input.number();
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  const std::vector<double> matrices = input.array<double>(p.batch * p.side * p.length);
  const std::vector<double> factors = input.array<double>(p.batch * p.side * p.side);
  const std::vector<double> shifts = input.array<double>(p.batch);
  const int64_t tiles = cuda::residual_tiles(p.side);
  std::vector<double> out(2 * p.batch * tiles);
  p.matrices = matrices.data();
  p.factors = factors.data();
  p.shifts = shifts.data();
  p.out = out.data();
  cuda_on_cpu::run({grid, cuda::kResidualThreads, sizeof(cuda::ResidualShared), seed},
                   [&] { cuda::cholesky_residual_kernel(p, tiles); });
  output.array(out);
}

const RegisterCase registered_cholesky_residual("cholesky_residual", run_cholesky_residual);

}  // namespace
}  // namespace lipfast

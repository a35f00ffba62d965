#pragma once

#include "case_shifted_grams.h"
#include "cholesky_bounds.cuh"

namespace lipfast {
namespace {

void run_cholesky_bounds(Input& input, Output& output) {
  const CertificateInput given(input);
  const int64_t batch = given.shape[0], side = given.shape[1], tiles = cuda::residual_tiles(side);
  const std::vector<double> factors = input.array<double>(batch * side * side);
  const std::vector<int64_t> failed = input.array<int64_t>(batch);
  const std::vector<int32_t> failures(failed.begin(), failed.end());
  const std::vector<double> scales = input.array<double>(batch), shifts = input.array<double>(batch);
  const std::vector<double> room = input.array<double>(2);
  std::vector<double> parts(2 * batch * tiles), upper(batch);
  const cuda::CholeskyBoundParams p{given.matrices, factors.data(), failures.data(), scales.data(), shifts.data(),
                                    room[0],        room[1],        parts.data(),    upper.data()};
  cuda_on_cpu::run({given.grid, cuda::kTileThreads, sizeof(cuda::ResidualShared<double>), given.seed}, [&] {
    given.single ? cuda::residual_parts_kernel<float>(p, tiles) : cuda::residual_parts_kernel<double>(p, tiles);
  });
  cuda_on_cpu::run({given.grid, cuda::kBoundThreads, cuda::kMaxWarps * sizeof(double), given.seed},
                   [&] { cuda::cholesky_bounds_kernel(p, tiles); });
  output.array(upper);
}

const RegisterCase registered_cholesky_bounds("cholesky_bounds", run_cholesky_bounds);

}  // namespace
}  // namespace lipfast

#pragma once

#include "jacobian_reduction.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

// A warp for a few Jacobians; two of them in a block.
template <class T, int kWidth>
void run_warps(const JacobianReductionParams& p, unsigned grid, uint64_t seed) {
  using G = cuda::Group<kWidth>;
  const cuda_on_cpu::Launch launch{grid, 64, sizeof(double) * 2 * G::kCount * G::kDoubles, seed};
  cuda_on_cpu::run(launch, [&] { cuda::jacobian_reduction_warp_kernel<T, kWidth>(p); });
}

template <class T>
void run_jacobian_reduction_as(Input& input, Output& output, JacobianReductionParams p, unsigned grid, uint64_t seed) {
  const std::vector<T> jacobian = input.array<T>(p.batch * p.outputs * p.inputs);
  std::vector<T> spectral(p.batch), frobenius(p.batch);
  p.jacobian = jacobian.data();
  p.spectral = spectral.data();
  p.frobenius = frobenius.data();
  const cuda::ReduceLayout layout(p.outputs, p.inputs);
  if (layout.side <= 4) {
    run_warps<T, 4>(p, grid, seed);
  } else if (layout.side <= 10) {
    run_warps<T, 10>(p, grid, seed);
  } else if (layout.side <= 16) {
    run_warps<T, 16>(p, grid, seed);
  } else if (layout.side <= cuda::kWarpSide) {
    run_warps<T, 32>(p, grid, seed);
  } else {
    std::vector<double> workspace(grid * layout.global());
    const cuda_on_cpu::Launch launch{grid, static_cast<unsigned>(layout.block()), sizeof(double) * layout.shared(),
                                     seed};
    cuda_on_cpu::run(launch, [&] { cuda::jacobian_reduction_kernel<T>(p, workspace.data()); });
  }
  output.array(spectral);
  output.array(frobenius);
}

void run_jacobian_reduction(Input& input, Output& output) {
  JacobianReductionParams p{};
  p.dtype = static_cast<Dtype>(input.number());
  p.batch = input.number();
  p.outputs = input.number();
  p.inputs = input.number();
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  p.dtype == Dtype::kFloat32 ? run_jacobian_reduction_as<float>(input, output, p, grid, seed)
                             : run_jacobian_reduction_as<double>(input, output, p, grid, seed);
}

const RegisterCase registered_jacobian_reduction("jacobian_reduction", run_jacobian_reduction);

}  // namespace
}  // namespace lipfast

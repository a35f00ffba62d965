// One instruction of a tensor core on the registers of a warp, lane by lane.
#pragma once

#include "tensor_core.cuh"

#include <algorithm>

#include "harness_cases.h"

namespace lipfast {
namespace {

void run_mma(Input& input, Output& output) {
  const std::vector<uint32_t> a = input.array<uint32_t>(32 * 4), b = input.array<uint32_t>(32 * 2);
  std::vector<float> sums = input.array<float>(32 * 4);
  cuda_on_cpu::run({1, 32, 0, 1}, [&] {
    uint32_t left[4], right[2];
    float own[4];
    std::copy_n(a.data() + 4 * cuda::lane(), 4, left);
    std::copy_n(b.data() + 2 * cuda::lane(), 2, right);
    std::copy_n(sums.data() + 4 * cuda::lane(), 4, own);
    cuda::multiply_tf32(left, right, own);
    std::copy_n(own, 4, sums.data() + 4 * cuda::lane());
  });
  output.array(sums);
}

const RegisterCase registered_mma("mma", run_mma);

}  // namespace
}  // namespace lipfast

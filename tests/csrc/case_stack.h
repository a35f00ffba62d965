#pragma once

#include "stack.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

// Tensors of one size within one array of bytes, at the given places.
void run_stack(Input& input, Output& output) {
  cuda::StackLaunch stack{};
  stack.count = input.number();
  stack.bytes = input.number();
  stack.unit = input.number();
  const int64_t size = input.number();
  const auto seed = static_cast<uint64_t>(input.number());
  for (int64_t i = 0; i < stack.count; ++i) stack.offsets[i] = static_cast<uint32_t>(input.number());
  const std::vector<char> all = input.array<char>(size);
  std::vector<char> out(stack.count * stack.bytes);
  stack.base = all.data();
  stack.out = out.data();
  cuda_on_cpu::run({2, cuda::kStackThreads, 0, seed}, [&] { cuda::stack_kernel(stack); });
  output.array(out);
}

const RegisterCase registered_stack("stack", run_stack);

}  // namespace
}  // namespace lipfast

// Body of stack; the contract is in stack.h.
#pragma once

#include "device.cuh"
#include "stack.h"

namespace lipfast::cuda {

struct alignas(16) SixteenBytes {
  uint32_t at[4];
};

template <class Word>
__device__ void copy_words(const StackLaunch& stack) {
  const int64_t words = stack.bytes / static_cast<int64_t>(sizeof(Word)), all = words * stack.count;
  auto* out = reinterpret_cast<Word*>(stack.out);
  for (int64_t at = blockIdx.x * threads() + thread(); at < all; at += gridDim.x * threads()) {
    const char* from = stack.base + stack.unit * stack.offsets[at / words];
    out[at] = reinterpret_cast<const Word*>(from)[at % words];
  }
}

__global__ void __launch_bounds__(kStackThreads) stack_kernel(const __grid_constant__ StackLaunch stack) {
  const uint64_t all = reinterpret_cast<uintptr_t>(stack.base) | reinterpret_cast<uintptr_t>(stack.out) |
                       static_cast<uint64_t>(stack.unit) | static_cast<uint64_t>(stack.bytes);
  if (all % 16 == 0) {
    copy_words<SixteenBytes>(stack);
  } else if (all % 4 == 0) {
    copy_words<uint32_t>(stack);
  } else {
    copy_words<uint8_t>(stack);
  }
}

}  // namespace lipfast::cuda

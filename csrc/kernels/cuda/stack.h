// clang-format off
// stack on CUDA: the bytes of many tensors of one size, one after another, in a launch per thousand of them.
//
// torch's own takes a launch per 128 tensors: with a thousand networks that would be most of what a bound launches.
// Errors       of launches only: launch.cuh.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast::cuda {

constexpr int kMaxStacked = 1000;  // of a launch
constexpr int64_t kStackThreads = 256;

// Tensor i begins at base + unit offsets[i]. All in a kernel's arguments, so that a captured graph holds what it needs.
struct StackLaunch {
  const char* base;
  int64_t unit, bytes;  // of a tensor
  int64_t count;
  char* out;
  uint32_t offsets[kMaxStacked];
};

// Sets base, unit, count and offsets for as many of the addresses as a launch takes.
void set_stacked(const void* const* addresses, int64_t count, StackLaunch& stack);

// Queues the kernel on `stream` (a cudaStream_t).
void launch_stack_cuda(const StackLaunch& stack, void* stream);

}  // namespace lipfast::cuda

// The device and stream that an op runs on, and its memory, through the stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../checks.h"

namespace lipfast {

using torch::stable::accelerator::DeviceGuard;

// Whether torch's functions for CUDA are bound: they live in a library of its CUDA builds alone.
bool bound_to_torch();

// The stream that the caller's work is queued on. Raises where torch's functions are not bound.
void* current_stream(const Tensor& tensor);

inline void check_device(const Tensor& tensor, const Tensor& like, const std::string& what) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), what,
                  ": expected a tensor on cuda:", like.get_device_index());
}

// Workspace on the device of `like`; where there is too little memory, the error says how much was needed.
Tensor bytes_like(const Tensor& like, int64_t bytes);

}  // namespace lipfast

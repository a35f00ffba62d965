// Device, stream and errors of CUDA, through the stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../checks.h"

// They live in torch's CUDA library, which a CPU-only torch lacks: the module must load there all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace lipfast {

using torch::stable::accelerator::DeviceGuard;

// The stream that the caller's work is queued on.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "lipfast: no current CUDA stream");
  return stream;
}

// Raises what a cudaError_t says.
inline void check_cuda(int error, const char* what) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, what, __LINE__, true, &message);
  if (message == nullptr) return;
  const std::string text = std::string(what) + ": " + message;
  torch_c10_cuda_free_error_msg(message);
  STD_TORCH_CHECK(false, text);
}

inline void check_device(const Tensor& tensor, const Tensor& like, const std::string& what) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), what,
                  ": expected a tensor on cuda:", like.get_device_index());
}

inline Tensor bytes_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace lipfast

#include "device.h"

#include <dlfcn.h>

namespace lipfast {
namespace {

using CurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

// Looked for when the module is loaded, after torch. Nothing may be linked against torch's CUDA library: a build
// against a CPU torch serves a CUDA torch, and the other way round.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

const CurrentStream current_stream_of = find_current_stream();

}  // namespace

bool bound_to_torch() { return current_stream_of != nullptr; }

void* current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(current_stream_of != nullptr,
                  "lipfast: libtorch_cuda.so was not loaded, or lacks aoti_torch_get_current_cuda_stream, when lipfast "
                  "was imported: import torch first, a CUDA build of 2.10 or later");
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream_of(tensor.get_device_index(), &stream) == 0, "lipfast: no current CUDA stream");
  return stream;
}

Tensor bytes_like(const Tensor& like, int64_t bytes) {
  try {
    return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  } catch (const std::exception& error) {
    throw std::runtime_error("out of memory on cuda:" + std::to_string(like.get_device_index()) + ": " +
                             std::to_string(bytes) + " bytes of workspace were needed (" + error.what() + ")");
  }
}

}  // namespace lipfast

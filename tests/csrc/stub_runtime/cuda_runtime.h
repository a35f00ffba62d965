// The part of the CUDA runtime that lipfast's launchers call, for a device that is played by fibers (cuda_on_cpu.h): a
// launch runs its kernel at once, on the memory of the CPU.
//
// As strict as the runtime: shared memory beyond 48 KB has to be allowed first, a cooperative launch fits the device,
// kernel arguments fit 4 KB, an error stays until it is taken. The device is a small one; environment variables, looked
// at in every call, make it another one:
//   LIPFAST_STUB_CAPABILITY  compute capability times ten (90); below 80 there is no image of any kernel
//   LIPFAST_STUB_DRIVER      the driver's CUDA version (13000), LIPFAST_STUB_SHARED bytes that a block may have
//   (232448) LIPFAST_STUB_ERROR       the cudaError_t of every launch (0)
#pragma once

#include "cuda_on_cpu.h"

#include <map>
#include <mutex>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorSystemDriverMismatch = 803,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned columns = 1, unsigned rows = 1, unsigned layers = 1) : x(columns), y(rows), z(layers) {}
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 grid, block;  // gridDim and blockDim, which are macros of cuda_on_cpu.h
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_stub {

constexpr int kProcessors = 4;
constexpr int kBlocksPerProcessor = 2;
constexpr int kRuntime = 13000;
constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr size_t kArgumentBytes = 4096;
constexpr uint64_t kSeed = 1;

inline std::mutex mutex;  // the machine of fibers is one
inline std::map<const void*, size_t> allowed;
inline cudaError_t last_error = cudaSuccess;

inline int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
inline int driver() { return setting("LIPFAST_STUB_DRIVER", kRuntime); }
inline int capability() { return setting("LIPFAST_STUB_CAPABILITY", 90); }
inline size_t most_shared() { return static_cast<size_t>(setting("LIPFAST_STUB_SHARED", 232448)); }

inline cudaError_t kept(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
// What every call that needs the device or a kernel's image says first.
inline cudaError_t state(bool with_kernel) {
  if (driver() < kRuntime) return cudaErrorInsufficientDriver;
  return with_kernel && capability() < 80 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

inline cudaError_t refusal(const void* kernel, const cudaLaunchConfig_t& config, bool cooperative) {
  if (state(true) != cudaSuccess) return state(true);
  const int forced = setting("LIPFAST_STUB_ERROR", 0);
  if (forced != 0) return static_cast<cudaError_t>(forced);
  const unsigned blocks = config.grid.x, threads = config.block.x;
  if (blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  const auto found = allowed.find(kernel);
  const size_t most = found == allowed.end() ? kSharedWithoutAsking : found->second;
  if (config.dynamicSmemBytes > most) return cudaErrorInvalidValue;
  const bool fits = blocks <= static_cast<unsigned>(kProcessors * kBlocksPerProcessor);
  return cooperative && !fits ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

}  // namespace cuda_stub

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_stub::last_error, cudaSuccess); }
inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    default:
      return "cudaError";
  }
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : cudaGetErrorName(error);
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_stub::driver();
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = cuda_stub::kRuntime;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cuda_stub::kept(cuda_stub::state(false));
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = size_t{3} << 20;
  *total = size_t{80} << 30;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_stub::kProcessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = cuda_stub::capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = cuda_stub::capability() % 10;
      break;
    default:
      *value = static_cast<int>(cuda_stub::most_shared());
  }
  return cuda_stub::kept(cuda_stub::state(false));
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard lock(cuda_stub::mutex);
  if (cuda_stub::state(true) != cudaSuccess) return cuda_stub::kept(cuda_stub::state(true));
  if (static_cast<size_t>(bytes) > cuda_stub::most_shared()) return cuda_stub::kept(cudaErrorInvalidValue);
  cuda_stub::allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared) {
  *blocks = threads <= 1024 && shared <= cuda_stub::most_shared() ? cuda_stub::kBlocksPerProcessor : 0;
  return cuda_stub::kept(cuda_stub::state(true));
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const int blocks = static_cast<int>(config->grid.x);
  *clusters = cuda_stub::kProcessors * cuda_stub::kBlocksPerProcessor / blocks;
  return cuda_stub::kept(cuda_stub::state(true));
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + size_t{0}) <= cuda_stub::kArgumentBytes, "kernel arguments hold 4 KB");
  const std::lock_guard lock(cuda_stub::mutex);
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    cooperative = cooperative || config->attrs[i].id == cudaLaunchAttributeCooperative;
  }
  const cudaError_t error = cuda_stub::refusal(reinterpret_cast<const void*>(kernel), *config, cooperative);
  if (error != cudaSuccess) return cuda_stub::kept(error);
  cuda_on_cpu::run({config->grid.x, config->block.x, config->dynamicSmemBytes, cuda_stub::kSeed, cooperative},
                   [&] { kernel(arguments...); });
  return cudaSuccess;
}

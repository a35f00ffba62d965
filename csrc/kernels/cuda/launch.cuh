// What the launchers share: how many blocks of a kernel the device holds at once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace lipfast::cuda {

// An error that has been taken note of must not come back from the next launch.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Allows a kernel dynamic shared memory, and sets how many of its blocks are resident at once on the current device.
// The allowance is always all that a block may have: it belongs to the kernel, so that a smaller one, set by another
// host thread between this and the launch, would make the launch fail. The kernels have no static shared memory.
inline cudaError_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  int device = 0, processors = 0, per_processor = 0, most_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && shared_bytes > 48 << 10) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
    }
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes);
  }
  *blocks = std::max<int64_t>(1, static_cast<int64_t>(per_processor) * processors);
  return taken(error);
}

}  // namespace lipfast::cuda

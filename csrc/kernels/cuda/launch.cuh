// What the launchers share: how many blocks of a kernel the device holds at once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace lipfast::cuda {

// Allows a kernel its dynamic shared memory, and sets how many of its blocks are resident at once on the current
// device.
inline cudaError_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes);
  }
  *blocks = std::max<int64_t>(1, static_cast<int64_t>(per_processor) * processors);
  return error;
}

}  // namespace lipfast::cuda

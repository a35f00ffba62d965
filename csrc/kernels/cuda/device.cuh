// What every kernel body uses of the device: one name for CUDA and for the shim that runs the same bodies on a CPU
// (tests/csrc/cuda_on_cpu.h).
#pragma once

#include <cstdint>

#include "../scalar.h"

#if defined(LIPFAST_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace lipfast::cuda {

#define LIPFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// All threads of a cooperative launch, with their writes to global memory.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

// Global to shared memory past the registers; kBytes: 4, 8 or 16, both addresses aligned to it.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kGroups of this thread's committed groups are under way.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace lipfast::cuda
#endif

// A phase that is called: its registers are its own, and none of another phase's are spilled for them.
#if defined(__CUDACC__)
#define LIPFAST_PHASE __noinline__ __device__
#else
#define LIPFAST_PHASE __device__
#endif

namespace lipfast::cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps() { return static_cast<int>(blockDim.x) / kWarp; }
__device__ inline int64_t thread() { return threadIdx.x; }
__device__ inline int64_t threads() { return blockDim.x; }

// Sum over a warp, the same in every lane: a fixed tree, so the result does not depend on timing.
__device__ inline double warp_sum(double value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
__device__ inline double warp_max(double value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = larger(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

// Sum over a block of whole warps, in a fixed order, the same in every thread. scratch: kMaxWarps doubles of shared
// memory. A barrier at the beginning and one before the result is read: what the block wrote before is visible after.
__device__ inline double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  __syncthreads();
  if (lane() == 0) scratch[warp()] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < warps(); ++i) sum += scratch[i];
  return sum;
}
__device__ inline double block_max(double value, double* scratch) {
  value = warp_max(value);
  __syncthreads();
  if (lane() == 0) scratch[warp()] = value;
  __syncthreads();
  double top = scratch[0];
  for (int i = 1; i < warps(); ++i) top = larger(top, scratch[i]);
  return top;
}

// e with 2^(e-1) <= value < 2^e; 0 for 0 and what is not finite.
__device__ inline int binary_exponent(double value) {
  int exponent = 0;
  if (value > 0 && value < INFINITY) frexp(value, &exponent);
  return exponent;
}

}  // namespace lipfast::cuda

// Small kernels with a bug each, and the same without: what the shim must tell apart.
#pragma once

#include "device.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

constexpr unsigned kPlantedThreads = 64;

// out = in reversed, through shared memory.
__global__ void reverse_kernel(const double* in, double* out, bool barrier) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<double*>(memory);
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[kPlantedThreads - 1 - threadIdx.x];
}

// The same with static shared memory.
__global__ void static_reverse_kernel(const double* in, double* out) {
  __shared__ double shared[kPlantedThreads];
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[kPlantedThreads - 1 - threadIdx.x];
}

// Writes `beyond` values past the end of shared or global memory.
__global__ void write_kernel(double* global, unsigned beyond, bool to_shared) {
  LIPFAST_DYNAMIC_SHARED(memory);
  double* to = to_shared ? reinterpret_cast<double*>(memory) : global;
  to[threadIdx.x + beyond] = 1;
}

// Sum over each warp under `mask`; the lanes outside the mask take part all the same.
__global__ void sum_kernel(const double* in, double* out, uint32_t mask) {
  double sum = in[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(mask, sum, lanes);
  out[threadIdx.x] = sum;
}

// Lanes under the mask only: those outside must not be read.
__global__ void half_sum_kernel(const double* in, double* out, int distance) {
  out[threadIdx.x] = 0;
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = in[threadIdx.x] + __shfl_xor_sync(0x0000FFFFu, in[threadIdx.x], distance);
}

// out = in through asynchronous copies; each thread reads what it has copied.
__global__ void copy_kernel(const double* in, double* out, bool wait) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<double*>(memory);
  cuda::copy_async<8>(shared + threadIdx.x, in + threadIdx.x);
  cuda::copy_async_commit();
  if (wait) cuda::copy_async_wait<0>();
  out[threadIdx.x] = shared[threadIdx.x];
  if (!wait) cuda::copy_async_wait<0>();
}

// Half of the block waits at one barrier, the other half at another.
__global__ void divergent_kernel(double* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

// Every thread counts in one place, atomically or not.
__global__ void count_kernel(double* out, bool atomic) {
  if (atomic) {
    atomicAdd(out, 1.0);
  } else {
    out[0] += 1;
  }
}

// Neighbouring lanes exchange values through shared memory.
__global__ void warp_kernel(const double* in, double* out, bool barrier) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<double*>(memory);
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// The first thread of each block writes, to a place of its own or not.
__global__ void block_kernel(double* out, bool apart) {
  if (threadIdx.x == 0) out[apart ? blockIdx.x : 0] = 1;
}

// Neighbouring lanes read each other's copies: a thread waits for its own only, so the barrier comes after the wait.
__global__ void neighbour_copy_kernel(const double* in, double* out, bool late) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<double*>(memory);
  cuda::copy_async<8>(shared + threadIdx.x, in + threadIdx.x);
  cuda::copy_async_commit();
  if (!late) cuda::copy_async_wait<0>();
  __syncthreads();
  if (late) cuda::copy_async_wait<0>();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

void run_planted(Input& input, Output& output) {
  const int64_t which = input.number();
  const bool bug = input.number() != 0;
  const auto seed = static_cast<uint64_t>(input.number());
  const std::vector<double> in = input.array<double>(kPlantedThreads);
  std::vector<double> out(kPlantedThreads);
  const cuda_on_cpu::Launch launch{which == 9 ? 2u : 1u, kPlantedThreads, kPlantedThreads * sizeof(double), seed};
  cuda_on_cpu::run(launch, [&] {
    switch (which) {
      case 0:
        return reverse_kernel(in.data(), out.data(), !bug);
      case 1:
        return write_kernel(out.data(), bug ? 1 : 0, true);
      case 2:
        return write_kernel(out.data(), bug ? 1 : 0, false);
      case 3:
        return sum_kernel(in.data(), out.data(), bug ? 0x0000FFFFu : 0xFFFFFFFFu);
      case 4:
        return half_sum_kernel(in.data(), out.data(), bug ? 16 : 8);
      case 5:
        return copy_kernel(in.data(), out.data(), !bug);
      case 6:
        return bug ? divergent_kernel(out.data()) : static_reverse_kernel(in.data(), out.data());
      case 7:
        return count_kernel(out.data(), !bug);
      case 8:
        return warp_kernel(in.data(), out.data(), !bug);
      case 9:
        return block_kernel(out.data(), !bug);
      case 10:
        return neighbour_copy_kernel(in.data(), out.data(), bug);
      default:
        std::exit(2);
    }
  });
  output.array(out);
}

const RegisterCase registered_planted("planted", run_planted);

}  // namespace
}  // namespace lipfast

// How kernels are started. Only here and in launch.cu are CUDA's launch, attribute and occupancy functions called, so
// that a stub of the runtime (tests/csrc/stub_runtime) can run all host code without a GPU.
//
// Errors       std::runtime_error: the op, what it asked for, what the device, driver or memory lacks, and what to do.
// Streams      nothing waits for the device; a launch can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace lipfast::cuda {

struct Grid {
  int64_t blocks;
  int64_t threads;           // of a block
  int64_t shared = 0;        // bytes of dynamic shared memory
  bool cooperative = false;  // all blocks must be resident at once, for a grid barrier
  int64_t cluster = 1;       // blocks of a cluster: compute capability 9.0 and later
};

// Raises what a cudaError_t of a call for `grid` means; returns where there is none.
void check_launch(const char* op, cudaError_t error, const Grid& grid);

// Bytes of shared memory that a block can have on the current device.
int64_t most_shared(const char* op);

// How many blocks of a kernel the current device holds at once: at least 1. grid.blocks does not matter.
int64_t resident_blocks(const char* op, const void* kernel, const Grid& grid);

template <class... Parameters>
int64_t resident_blocks(const char* op, void (*kernel)(Parameters...), const Grid& grid) {
  return resident_blocks(op, reinterpret_cast<const void*>(kernel), grid);
}

// Allows a kernel its dynamic shared memory. The allowance is always all that a block may have: it belongs to the
// kernel, so that a smaller one, set by another host thread between this and the launch, would make the launch fail.
// The kernels have no static shared memory.
void allow_shared(const char* op, const void* kernel, const Grid& grid);

// grid, stream and the attributes that say what else is asked for.
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  LaunchConfig(const char* op, const Grid& grid, void* stream);
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Queues kernel(arguments...) on `stream` (a cudaStream_t) of the current device; no blocks: nothing.
template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, void* stream,
            const std::type_identity_t<Parameters>&... arguments) {
  if (grid.blocks == 0) return;
  allow_shared(op, reinterpret_cast<const void*>(kernel), grid);
  const LaunchConfig launched(op, grid, stream);
  check_launch(op, cudaLaunchKernelEx(&launched.config, kernel, arguments...), grid);
}

// As many blocks as the device holds at once, where grid.blocks are more: they take their work in turn.
template <class... Parameters>
void launch_in_turn(const char* op, void (*kernel)(Parameters...), Grid grid, void* stream,
                    const std::type_identity_t<Parameters>&... arguments) {
  if (grid.blocks == 0) return;
  grid.blocks = std::min(grid.blocks, resident_blocks(op, kernel, grid));
  launch(op, kernel, grid, stream, arguments...);
}

}  // namespace lipfast::cuda

#include "launch.cuh"

#include <stdexcept>
#include <string>

namespace lipfast::cuda {
namespace {

constexpr int64_t kSharedWithoutAsking = 48 << 10;
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

[[noreturn]] void refuse(const char* op, const std::string& reason) {
  throw std::runtime_error(std::string(op) + ": " + reason);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}

std::string number(int value, int unit, int part) {
  return std::to_string(value / unit) + "." + std::to_string(value % unit / part);
}

std::string versions() {
  int driver = 0, runtime = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  static_cast<void>(cudaRuntimeGetVersion(&runtime));
  const std::string found =
      driver == 0 ? "there is no CUDA driver" : "the driver is for CUDA " + number(driver, 1000, 10);
  return found + ", these kernels were built with CUDA " + number(runtime, 1000, 10);
}

std::string asked(const Grid& grid) {
  std::string text = std::to_string(grid.blocks) + (grid.cooperative ? " blocks at once of " : " blocks of ") +
                     std::to_string(grid.threads) + " threads";
  if (grid.cluster > 1) text += " in clusters of " + std::to_string(grid.cluster);
  return text + (grid.shared > 0 ? ", " + std::to_string(grid.shared) + " bytes of shared memory each" : "");
}

std::string memory() {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return "";
  return "; " + std::to_string(free >> 20) + " MiB of " + std::to_string(total >> 20) + " MiB are free";
}

std::string meaning(cudaError_t error, const Grid& grid) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion: {
      const int major = attribute(cudaDevAttrComputeCapabilityMajor);
      const std::string capability =
          std::to_string(major) + "." + std::to_string(attribute(cudaDevAttrComputeCapabilityMinor));
      const std::string device =
          "no kernel of this build runs on the device, whose compute capability is " + capability;
      if (major < 8) return device + ": lipfast needs 8.0 or later; move the tensors to the CPU";
      return device + " ('lipfast info' lists what was built; " + versions() +
             "): build again with TORCH_CUDA_ARCH_LIST=" + capability;
    }
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorSystemDriverMismatch:
      return versions() + ": update the driver, or build again with an older toolkit";
    case cudaErrorNoDevice:
      return "no CUDA device is visible: look at nvidia-smi and at CUDA_VISIBLE_DEVICES";
    case cudaErrorMemoryAllocation:
      return "out of memory on the device for a kernel of " + asked(grid) + memory();
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidValue:
      return std::string("the device cannot hold ") + asked(grid) + " (" + cudaGetErrorName(error) + ")";
    default:
      return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + "), at a kernel of " +
             asked(grid) + " or at earlier work on the device; CUDA_LAUNCH_BLOCKING=1 shows where";
  }
}

}  // namespace

void check_launch(const char* op, cudaError_t error, const Grid& grid) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // it has been taken note of: the next launch must not return it
  refuse(op, meaning(error, grid));
}

int64_t most_shared(const char* op) {
  int device = 0, most = 0;
  check_launch(op, cudaGetDevice(&device), {});
  check_launch(op, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), {});
  return most;
}

void allow_shared(const char* op, const void* kernel, const Grid& grid) {
  if (grid.shared <= kSharedWithoutAsking) return;
  const int64_t most = most_shared(op);
  if (grid.shared > most) {
    refuse(op, "a block needs " + std::to_string(grid.shared) + " bytes of shared memory, the device has " +
                   std::to_string(most));
  }
  check_launch(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)),
               grid);
}

int64_t resident_blocks(const char* op, const void* kernel, const Grid& grid) {
  allow_shared(op, kernel, grid);
  int device = 0, processors = 0, found = 0;
  check_launch(op, cudaGetDevice(&device), grid);
  const auto threads = static_cast<int>(grid.threads);
  const auto shared = static_cast<size_t>(grid.shared);
  if (grid.cluster > 1) {
    Grid one = grid;
    one.blocks = grid.cluster;
    const LaunchConfig launched(op, one, nullptr);
    check_launch(op, cudaOccupancyMaxActiveClusters(&found, kernel, &launched.config), grid);
    processors = static_cast<int>(grid.cluster);
  } else {
    check_launch(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), grid);
    check_launch(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, threads, shared), grid);
  }
  if (found == 0) check_launch(op, cudaErrorLaunchOutOfResources, grid);
  return static_cast<int64_t>(found) * processors;
}

LaunchConfig::LaunchConfig(const char* op, const Grid& grid, void* stream) {
  if (grid.blocks > kMostBlocks) refuse(op, std::to_string(grid.blocks) + " blocks are too many for one launch");
  // By position: the shim has macros of the members' names.
  config = {dim3(static_cast<unsigned>(grid.blocks)),
            dim3(static_cast<unsigned>(grid.threads)),
            static_cast<size_t>(grid.shared),
            static_cast<cudaStream_t>(stream),
            attributes,
            0};
  if (grid.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
}

}  // namespace lipfast::cuda

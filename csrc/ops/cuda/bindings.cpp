// lipfast._C_cuda: importing it registers the CUDA kernels. It loads on a machine without a GPU.
#include <pybind11/pybind11.h>

#include "device.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of lipfast: build information.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["nvcc"] = LIPFAST_NVCC;
        info["architectures"] = LIPFAST_ARCHITECTURES;
        info["torch"] = LIPFAST_TORCH_VERSION;
        info["version"] = LIPFAST_VERSION;
        return info;
      },
      "nvcc, architectures, torch version and package version of the build.");
  m.def("bound_to_torch", &lipfast::bound_to_torch,
        "Whether torch's functions for CUDA were found when this was loaded.");
}

// lipfast._C: what is not a tensor op. Importing it also registers the ops (static initialisers of this library).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels/cpu/capability.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of lipfast: CPU capability and build information.";
  m.def(
      "capability", [] { return std::string(lipfast::capability_name(lipfast::capability())); },
      "Name of the instruction set in use.");
  m.def(
      "available_capabilities",
      [] {
        std::vector<std::string> names;
        for (const auto value : lipfast::available_capabilities()) names.emplace_back(lipfast::capability_name(value));
        return names;
      },
      "Names of the instruction sets that this build holds and this processor runs, worst first.");
  m.def("set_capability", &lipfast::set_capability, pybind11::arg("name"), "Forces an instruction set (for tests).");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = LIPFAST_COMPILER;
        info["torch"] = LIPFAST_TORCH_VERSION;
        info["version"] = LIPFAST_VERSION;
        return info;
      },
      "Compiler, torch version and package version of the build.");
}

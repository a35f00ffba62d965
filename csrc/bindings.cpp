// lipfast._C: what is not a tensor op. Importing it also registers the ops (static initialisers of this library).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "kernels/cpu/capability.h"
#include "ops/cpu/interrupts.h"

namespace lipfast {
namespace {

PyObject* raised = nullptr;                // by a signal's handler or a watcher; guarded by the GIL
thread_local PyObject* watcher = nullptr;  // of this thread's call

// The exception that is set, as an object.
PyObject* fetched() {
  pybind11::error_already_set error;
  return pybind11::object(error.value()).release().ptr();
}

}  // namespace

bool python_interrupts(double share) {
  if (Py_IsInitialized() == 0) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  PyObject* answer = watcher == nullptr ? nullptr : PyObject_CallFunction(watcher, "d", share);
  const bool failed = (watcher != nullptr && answer == nullptr) || PyErr_CheckSignals() != 0;
  Py_XDECREF(answer);
  if (failed) Py_XSETREF(raised, fetched());
  PyGILState_Release(state);
  return failed;
}

}  // namespace lipfast

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
  m.attr("INTERRUPTED") = lipfast::kInterrupted;
  m.def(
      "take_interrupt",
      [] {
        auto found = pybind11::reinterpret_steal<pybind11::object>(std::exchange(lipfast::raised, nullptr));
        return found ? found : pybind11::none();
      },
      "What was raised while an op of the main thread worked, once; None: nothing.");
  m.def(
      "watch",
      [](const pybind11::object& call) {
        Py_XSETREF(lipfast::watcher, call.is_none() ? nullptr : pybind11::object(call).release().ptr());
      },
      pybind11::arg("call"), "Has this thread's long ops call something with the share that is done; None: nothing.");
}

#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace lipfast {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

bool runs_here(Capability value) {
  if (value == Capability::kDefault) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (value == Capability::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Capability parse(const std::string& name) {
  std::string choices;
  for (const Capability value : available_capabilities()) {
    if (name == capability_name(value)) return value;
    choices += (choices.empty() ? "" : ", ") + std::string(capability_name(value));
  }
  throw std::invalid_argument("CPU capability '" + name + "' cannot run here; choose one of: " + choices);
}

Capability from_environment() {
  const char* name = std::getenv("LIPFAST_CPU_CAPABILITY");
  if (name == nullptr || *name == '\0') return available_capabilities().back();
  try {
    return parse(name);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(std::string("LIPFAST_CPU_CAPABILITY: ") + error.what());
  }
}

std::atomic<int> chosen{-1};

}  // namespace

const char* capability_name(Capability value) { return kNames[static_cast<int>(value)]; }

std::vector<Capability> available_capabilities() {
  std::vector<Capability> found;
  for (const Capability value : {Capability::kDefault, Capability::kAvx2, Capability::kAvx512}) {
    if (runs_here(value)) found.push_back(value);
  }
  return found;
}

Capability capability() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int>(from_environment());
    chosen.store(value, std::memory_order_relaxed);
  }
  return static_cast<Capability>(value);
}

void set_capability(const std::string& name) { chosen.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

}  // namespace lipfast

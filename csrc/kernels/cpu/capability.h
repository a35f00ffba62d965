// Which copy of a kernel runs: chosen once from the processor, overridable by the environment variable
// LIPFAST_CPU_CAPABILITY (default, avx2, avx512) and, for tests, by set_capability.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace lipfast {

enum class Capability : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// The copy in use. Throws std::runtime_error when the environment names one that cannot run here.
Capability capability();
const char* capability_name(Capability value);

// Those that this build holds and this processor runs, worst first.
std::vector<Capability> available_capabilities();

// Throws std::invalid_argument when `name` is unknown or cannot run here.
void set_capability(const std::string& name);

// Of the copies that this build holds, one per capability, the one in use.
template <class Kernel, size_t kCopies>
Kernel dispatch(const Kernel (&copies)[kCopies]) {
  return copies[std::min(static_cast<size_t>(capability()), kCopies - 1)];
}

}  // namespace lipfast

#include "stack.cuh"

#include "launch.cuh"

namespace lipfast::cuda {

// Offsets are in units of the largest power of two that divides them all. Where they do not fit into 32 bits, fewer
// tensors are taken: one alone always fits.
void set_stacked(const void* const* addresses, int64_t count, StackLaunch& stack) {
  const auto number = [addresses](int64_t i) { return reinterpret_cast<uintptr_t>(addresses[i]); };
  stack.count = std::min<int64_t>(count, kMaxStacked);
  for (;; stack.count /= 2) {
    uintptr_t first = number(0), last = first, differences = 0;
    for (int64_t i = 1; i < stack.count; ++i) {
      first = std::min(first, number(i));
      last = std::max(last, number(i));
      differences |= number(i) - number(0);
    }
    const uintptr_t unit = differences == 0 ? 16 : differences & (0 - differences);
    if (stack.count > 1 && (last - first) / unit > 0xFFFFFFFFu) continue;
    stack.base = reinterpret_cast<const char*>(first);
    stack.unit = static_cast<int64_t>(unit);
    for (int64_t i = 0; i < stack.count; ++i) stack.offsets[i] = static_cast<uint32_t>((number(i) - first) / unit);
    return;
  }
}

void launch_stack_cuda(const StackLaunch& stack, void* stream) {
  static_assert(sizeof(StackLaunch) <= 4096, "kernel arguments hold 4 KB");
  constexpr int64_t kBlockBytes = 16 * kStackThreads;
  launch_in_turn("stack", &stack_kernel, {(stack.count * stack.bytes + kBlockBytes - 1) / kBlockBytes, kStackThreads},
                 stream, stack);
}

}  // namespace lipfast::cuda

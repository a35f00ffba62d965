// Work handed to the threads of torch's pool in the order given, in the arithmetic that the proofs assume.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>

#include "../../kernels/cpu/workspace.h"
#include "../../kernels/params.h"

namespace lipfast {

// IEEE arithmetic as the proofs assume it: round to nearest, denormals kept. A thread may come with another mode
// (torch.set_flush_denormal); it gets it back.
class StandardArithmetic {
 public:
  StandardArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardArithmetic() { std::fesetenv(&before_); }
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;

 private:
  std::fenv_t before_;
};

// Calls body(item, workspace) for every item in [0, count), each on one thread, taken one by one from a shared
// counter: items of very different cost balance. make_workspace is called once per thread; `enter` makes an object of
// every thread that lives as long as it works.
template <class MakeWorkspace, class Body, class Enter>
void for_each_item(int64_t count, const MakeWorkspace& make_workspace, const Body& body, const Enter& enter) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const auto entered = enter();
    int64_t item = next.fetch_add(1);
    if (item >= count) return;
    const StandardArithmetic arithmetic;
    const Workspace workspace = make_workspace();
    for (; item < count; item = next.fetch_add(1)) body(item, workspace);
  });
}
template <class MakeWorkspace, class Body>
void for_each_item(int64_t count, const MakeWorkspace& make_workspace, const Body& body) {
  for_each_item(count, make_workspace, body, [] { return 0; });
}

// The same for one large matrix's kernel.
inline constexpr Parallel kThreads{[](int64_t count, void (*body)(void*, int64_t), void* argument) {
  for_each_item(count, [] { return Workspace(0); }, [&](int64_t item, const Workspace&) { body(argument, item); });
}};

}  // namespace lipfast

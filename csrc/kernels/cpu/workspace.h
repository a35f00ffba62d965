// Scratch memory of one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace lipfast {

// Uninitialised, aligned to a cache line.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(::operator new(static_cast<size_t>(bytes), kAlignment)) {}
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Release {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Release> memory_;
};

}  // namespace lipfast

// Data races between CUDA threads that run as fibers: two accesses to one address, one of them a write, by two threads
// between which no barrier stands. The compiler's thread sanitizer reports every access of a kernel; its run-time
// library is replaced by race_check.cpp, which knows CUDA's barriers instead of locks. Whether a race is found does not
// depend on the order in which the fibers run.
//
// What orders two accesses: __syncthreads within a block, __syncwarp of a whole warp within a warp, the grid barrier
// between blocks. Shuffles and ballots do not (CUDA C++ Programming Guide, warp vote and shuffle functions). Atomic
// operations race with plain accesses only. An asynchronous copy writes at any time between its issue and its wait.
// Addresses are told apart to 4 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

// How many barriers of each kind have been passed.
struct Clock {
  uint32_t barriers = 0;
};

// The running thread.
struct RaceThread {
  uint32_t block = 0, thread = 0;
  const Clock *warp_clock = nullptr, *block_clock = nullptr, *grid_clock = nullptr;
  uintptr_t stack = 0, stack_end = 0;  // its own variables: not looked at
};

enum class Access { kRead, kWrite, kAtomic };

#if defined(LIPFAST_RACE_CHECK)

void race_forget_everything();
void race_forget(const void* from, size_t bytes);
void race_run(const RaceThread& thread);
void race_access(const void* address, size_t bytes, Access access);
void race_copy_issued(const void* to, const void* from, size_t bytes);
void race_copy_landed(const void* to, const void* from, size_t bytes);
// Whether accesses are a kernel's own. Returns what was set before.
bool race_watch(bool watch);

#else

inline void race_forget_everything() {}
inline void race_forget(const void*, size_t) {}
inline void race_run(const RaceThread&) {}
inline void race_access(const void*, size_t, Access) {}
inline void race_copy_issued(const void*, const void*, size_t) {}
inline void race_copy_landed(const void*, const void*, size_t) {}
inline bool race_watch(bool) { return false; }

#endif

// The shim's own accesses are not the kernel's.
class Unwatched {
 public:
  Unwatched() { race_watch(false); }
  ~Unwatched() { race_watch(true); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace cuda_on_cpu

// CUDA's execution model on one CPU thread, for testing kernels without a GPU: one fiber per CUDA thread.
//
// Fibers run in a seeded random order (odd seeds: evenly mixed; even ones: some warps far ahead of others, as
// Burckhardt et al. 2010) and switch only where threads may legally wait for each other: barriers, warp
// operations, atomics. So a missing barrier, or a missing wait for an asynchronous copy, shows as a difference between
// seeds or as poison in the result; a build with race_check.cpp finds races themselves, whatever the order. Not shown:
// weak memory ordering between blocks, and anything about speed.
//
// Stricter than the hardware, which leaves these undefined: threads of a block at different __syncthreads, a warp
// operation whose mask leaves out the caller or names a thread that never comes, and different warp operations under
// one mask, end the program with a message. Values read from lanes outside the mask are poison.
//
// Blocks of an ordinary launch run one after another; those of a cooperative one together, and there memory declared
// __shared__ (a static variable here) would be common to all blocks: such kernels take dynamic shared memory only.
// Dynamic shared memory is one heap block of the exact size, so that the address sanitizer sees its ends.
#pragma once

#undef _FORTIFY_SOURCE  // it takes a jump between stacks for an attack
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "race_check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating type

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  unsigned grid, block;
  size_t shared_bytes = 0;
  uint64_t seed = 0;
  bool cooperative = false;
};

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::fflush(stderr);
  std::_Exit(70);
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Block;

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  unsigned thread = 0;
  bool finished = false;
  bool waiting = false;
  std::deque<std::vector<Copy>> copies{{}};  // groups; the last one is still open
  void* fake_stack = nullptr;                // of the address sanitizer
};

// What the warp operations under one mask collect until all its lanes have come. Two sets of values: a fast lane may
// come to the next operation while slow ones have yet to read this one's, but not to the one after that.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* operation = nullptr;
  uint64_t values[2][kWarpSize] = {};
  int now = 0;
};

struct Warp {
  std::deque<Rendezvous> operations;  // one per mask
  uint64_t urgency = 0;
  Clock clock;
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Clock clock;
  std::unique_ptr<char[]> shared;
  unsigned arrived = 0, finished = 0, votes = 0, last_votes = 0;
  int line = 0;
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void run(const Launch& launch, const std::function<void()>& kernel) {
    if (launch.block == 0 || launch.block > 1024) fail("a block has 1 to 1024 threads");
    launch_ = launch;
    kernel_ = &kernel;
    random_.seed(launch.seed);
    race_forget_everything();
    std::vector<unsigned> order(launch.grid);
    for (unsigned i = 0; i < launch.grid; ++i) order[i] = i;
    for (unsigned i = launch.grid; i > 1; --i) std::swap(order[i - 1], order[random_() % i]);
    if (launch.cooperative) {
      run_together(order);
    } else {
      for (const unsigned index : order) run_together({index});
    }
  }

  Fiber& current() { return *current_; }
  const Launch& launch() const { return launch_; }

  // Gives the processor away; comes back when the scheduler picks this fiber again.
  void switch_away() {
    Fiber& self = *current_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_bottom_, scheduler_size_);
    swapcontext(&self.context, &scheduler_);
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_bottom_, &scheduler_size_);
#else
    if (_setjmp(self.jump) == 0) _longjmp(scheduler_jump_, 1);
#endif
  }

  void yield() {
    ready_.push_back(current_);
    switch_away();
  }

  // Returns how many threads of the block voted true.
  unsigned block_barrier(int line, bool vote) {
    Block& block = *current_->block;
    if (block.arrived > 0 && block.line != line) {
      fail("threads of block " + std::to_string(block.index) + " wait at __syncthreads in lines " +
           std::to_string(block.line) + " and " + std::to_string(line));
    }
    block.line = line;
    block.votes += vote;
    ++block.arrived;
    wait_until_released([&] { return release_block(block); });
    return block.last_votes;
  }

  void grid_barrier() {
    if (!launch_.cooperative) fail("a grid barrier needs a cooperative launch");
    block_barrier(-1, false);
    if (current_->thread == 0) {
      ++grid_arrived_;
      wait_until_released(
          [&] {
            if (grid_arrived_ < launch_.grid) return false;
            grid_arrived_ = 0;
            ++grid_clock_.barriers;
            for (Fiber* fiber : grid_waiting_) wake(fiber);
            grid_waiting_.clear();
            return true;
          },
          &grid_waiting_);
    }
    block_barrier(-2, false);
  }

  // Contributes a value to a warp operation; returns those of all lanes once every lane of the mask has come.
  void exchange(const char* operation, uint32_t mask, uint64_t value, uint64_t (&out)[kWarpSize]) {
    Fiber& self = *current_;
    Block& block = *self.block;
    const unsigned lane = self.thread % kWarpSize, first = self.thread - lane;
    const auto refuse = [&](const std::string& reason) {
      fail(std::string(operation) + " by lane " + std::to_string(lane) + " of block " + std::to_string(block.index) +
           ": " + reason);
    };
    if ((mask >> lane & 1) == 0) refuse("its mask leaves out the calling lane");
    for (unsigned i = 0; i < kWarpSize; ++i) {
      if ((mask >> i & 1) != 0 && (first + i >= block.fibers.size() || block.fibers[first + i]->finished)) {
        refuse("its mask names lane " + std::to_string(i) + ", which has returned or does not exist");
      }
    }
    Warp& warp = block.warps[first / kWarpSize];
    Rendezvous& here = rendezvous(warp.operations, mask);
    if (here.arrived == 0) {
      here.operation = operation;
      here.now = 1 - here.now;
      std::memset(here.values[here.now], kPoison, sizeof(here.values[0]));
    }
    if (std::strcmp(here.operation, operation) != 0) refuse(std::string("other lanes wait in ") + here.operation);
    const uint64_t* values = here.values[here.now];
    here.values[here.now][lane] = value;
    here.arrived |= 1u << lane;
    if (here.arrived == mask) {
      here.arrived = 0;
      if (std::strcmp(operation, "__syncwarp") == 0 && mask == 0xFFFFFFFFu) ++warp.clock.barriers;
      for (unsigned i = 0; i < kWarpSize; ++i) {
        if ((mask >> i & 1) != 0 && i != lane) ready_.push_back(block.fibers[first + i]);
      }
    } else {
      switch_away();
    }
    std::memcpy(out, values, sizeof(out));
  }

 private:
  void run_together(const std::vector<unsigned>& indices) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    ready_.clear();
    grid_arrived_ = 0;
    grid_waiting_.clear();
    for (const unsigned index : indices) {
      blocks.push_back(std::make_unique<Block>());
      Block& block = *blocks.back();
      block.index = index;
      block.warps.resize((launch_.block + kWarpSize - 1) / kWarpSize);
      for (Warp& warp : block.warps) warp.urgency = random_();
      block.shared.reset(new char[launch_.shared_bytes + 1]);  // the sanitizer wants at least a byte
      std::memset(block.shared.get(), kPoison, launch_.shared_bytes);
      race_forget(block.shared.get(), launch_.shared_bytes);
      for (unsigned thread = 0; thread < launch_.block; ++thread) {
        fibers.push_back(make_fiber(block, thread));
        block.fibers.push_back(fibers.back().get());
        ready_.push_back(fibers.back().get());
      }
    }
    size_t unfinished = fibers.size();
    while (!ready_.empty()) {
      const size_t pick = launch_.seed % 2 == 1 ? random_() % ready_.size() : most_urgent();
      std::swap(ready_[pick], ready_.back());
      current_ = ready_.back();
      ready_.pop_back();
      resume(*current_);
      if (current_->finished) {
        --unfinished;
        pool_.push_back(std::move(current_->stack));
        finish(*current_);
      }
    }
    if (unfinished > 0) fail("deadlock: " + std::to_string(unfinished) + " threads wait for others that never come");
  }

  // Of the ready fibers, one of the warp that is furthest up the order; now and then a warp gets a new place in it.
  size_t most_urgent() {
    size_t best = random_() % ready_.size();
    for (size_t i = 0; i < ready_.size(); ++i) {
      if (urgency(*ready_[i]) > urgency(*ready_[best])) best = i;
    }
    if (random_() % 512 == 0) urgency(*ready_[best]) = random_();
    return best;
  }
  uint64_t& urgency(Fiber& fiber) { return fiber.block->warps[fiber.thread / kWarpSize].urgency; }

  std::unique_ptr<Fiber> make_fiber(Block& block, unsigned thread) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = &block;
    fiber->thread = thread;
    if (pool_.empty()) {
      fiber->stack.reset(new char[kStackBytes]);
    } else {
      fiber->stack = std::move(pool_.back());
      pool_.pop_back();
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->stack.get(), kStackBytes);  // frames of the thread that used it before
#endif
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &Machine::start, 0);
    return fiber;
  }

  static void start() {
    Machine& machine = instance();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom_, &machine.scheduler_size_);
#endif
    race_watch(true);
    (*machine.kernel_)();
    race_watch(false);
    machine.current_->finished = true;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, machine.scheduler_bottom_, machine.scheduler_size_);
    setcontext(&machine.scheduler_);
#else
    _longjmp(machine.scheduler_jump_, 1);
#endif
  }

  // setjmp makes no system call, swapcontext two; the sanitizer knows the latter only.
  void resume(Fiber& fiber) {
    const auto stack = reinterpret_cast<uintptr_t>(fiber.stack.get());
    race_run({fiber.block->index, fiber.thread, &fiber.block->warps[fiber.thread / kWarpSize].clock,
              &fiber.block->clock, &grid_clock_, stack, stack + kStackBytes});
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    if (_setjmp(scheduler_jump_) != 0) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
#endif
  }

  void finish(Fiber& fiber) {
    if (fiber.copies.size() > 1 || !fiber.copies.back().empty()) fail("a thread returned with copies it never awaited");
    ++fiber.block->finished;
    if (fiber.block->arrived > 0) release_block(*fiber.block);
  }

  void wake(Fiber* fiber) {
    fiber->waiting = false;
    ready_.push_back(fiber);
  }

  bool release_block(Block& block) {
    if (block.arrived + block.finished < block.fibers.size()) return false;
    block.arrived = 0;
    ++block.clock.barriers;
    block.last_votes = block.votes;
    block.votes = 0;
    for (Fiber* fiber : block.fibers) {
      if (fiber->waiting) wake(fiber);
    }
    return true;
  }

  template <class Release>
  void wait_until_released(const Release& release, std::vector<Fiber*>* queue = nullptr) {
    Fiber& self = *current_;
    if (queue != nullptr) {
      queue->push_back(&self);
    } else {
      self.waiting = true;
    }
    release();
    switch_away();
  }

  static Rendezvous& rendezvous(std::deque<Rendezvous>& warp, uint32_t mask) {
    for (Rendezvous& known : warp) {
      if (known.mask == mask) return known;
    }
    warp.emplace_back();
    warp.back().mask = mask;
    return warp.back();
  }

  Launch launch_{};
  const std::function<void()>* kernel_ = nullptr;
  std::mt19937_64 random_;
  std::vector<Fiber*> ready_, grid_waiting_;
  unsigned grid_arrived_ = 0;
  Clock grid_clock_;
  Fiber* current_ = nullptr;
  ucontext_t scheduler_;
  jmp_buf scheduler_jump_;
  std::vector<std::unique_ptr<char[]>> pool_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
};

// kernel<<<grid, block, shared_bytes>>>(...): run(launch, [&] { kernel(...); })
inline void run(const Launch& launch, const std::function<void()>& kernel) { Machine::instance().run(launch, kernel); }

inline Fiber& fiber() { return Machine::instance().current(); }
inline Index thread_index() {
  const Unwatched shim;
  return {fiber().thread, 0, 0};
}
inline Index block_index() {
  const Unwatched shim;
  return {fiber().block->index, 0, 0};
}
inline Index block_dimensions() {
  const Unwatched shim;
  return {Machine::instance().launch().block, 1, 1};
}
inline Index grid_dimensions() {
  const Unwatched shim;
  return {Machine::instance().launch().grid, 1, 1};
}
inline char* dynamic_shared() {
  const Unwatched shim;
  return fiber().block->shared.get();
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const char* operation, uint32_t mask, T value, unsigned source) {
  const Unwatched shim;
  uint64_t values[kWarpSize];
  Machine::instance().exchange(operation, mask, to_bits(value), values);
  return from_bits<T>(values[source % kWarpSize]);
}

}  // namespace cuda_on_cpu

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_dimensions())
#define gridDim (cuda_on_cpu::grid_dimensions())

inline void __syncthreads(int line = __builtin_LINE()) {
  const cuda_on_cpu::Unwatched shim;
  cuda_on_cpu::Machine::instance().block_barrier(line, false);
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  const cuda_on_cpu::Unwatched shim;
  return static_cast<int>(cuda_on_cpu::Machine::instance().block_barrier(line, predicate != 0));
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { cuda_on_cpu::shuffle("__syncwarp", mask, 0, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, static_cast<unsigned>(source));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, (cuda_on_cpu::thread_index().x % 32) ^ unsigned(lanes));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes) {
  const unsigned lane = cuda_on_cpu::thread_index().x % 32;
  const T moved = cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, lane + lanes);
  return lane + lanes < 32 ? moved : value;
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const cuda_on_cpu::Unwatched shim;
  uint64_t values[cuda_on_cpu::kWarpSize];
  cuda_on_cpu::Machine::instance().exchange("__ballot_sync", mask, predicate != 0, values);
  uint32_t votes = 0;
  for (int lane = 0; lane < cuda_on_cpu::kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0 && values[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}

template <class T>
T atomicAdd(T* address, T value) {
  const cuda_on_cpu::Unwatched shim;
  cuda_on_cpu::Machine::instance().yield();
  cuda_on_cpu::race_access(address, sizeof(*address), cuda_on_cpu::Access::kAtomic);
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const cuda_on_cpu::Unwatched shim;
  cuda_on_cpu::Machine::instance().yield();
  cuda_on_cpu::race_access(address, sizeof(*address), cuda_on_cpu::Access::kAtomic);
  const T before = *address;
  if (before < value) *address = value;
  return before;
}
inline uint32_t atomicOr(uint32_t* address, uint32_t value) {
  const cuda_on_cpu::Unwatched shim;
  cuda_on_cpu::Machine::instance().yield();
  cuda_on_cpu::race_access(address, sizeof(*address), cuda_on_cpu::Access::kAtomic);
  const uint32_t before = *address;
  *address = before | value;
  return before;
}

inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t __float_as_uint(float value) { return static_cast<uint32_t>(cuda_on_cpu::to_bits(value)); }
inline float __uint_as_float(uint32_t bits) { return cuda_on_cpu::from_bits<float>(bits); }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}

namespace lipfast::cuda {

#define LIPFAST_DYNAMIC_SHARED(name) char* name = cuda_on_cpu::dynamic_shared()

inline void grid_barrier() {
  const cuda_on_cpu::Unwatched shim;
  cuda_on_cpu::Machine::instance().grid_barrier();
}

template <int kBytes>
inline void copy_async(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const cuda_on_cpu::Unwatched shim;
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    cuda_on_cpu::fail("cp.async of " + std::to_string(kBytes) + " bytes between addresses that are not aligned to it");
  }
  cuda_on_cpu::race_copy_issued(to, from, kBytes);
  cuda_on_cpu::fiber().copies.back().push_back({to, from, kBytes});
}
inline void copy_async_commit() {
  const cuda_on_cpu::Unwatched shim;
  cuda_on_cpu::fiber().copies.emplace_back();
}
// Until at most kGroups of the committed groups are under way.
template <int kGroups>
inline void copy_async_wait() {
  const cuda_on_cpu::Unwatched shim;
  auto& copies = cuda_on_cpu::fiber().copies;
  while (copies.size() > kGroups + 1) {
    for (const cuda_on_cpu::Copy& copy : copies.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      cuda_on_cpu::race_copy_landed(copy.to, copy.from, copy.bytes);
    }
    copies.pop_front();
  }
}

}  // namespace lipfast::cuda

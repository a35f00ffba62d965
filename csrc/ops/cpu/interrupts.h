// Ctrl-C while an op works, and how far it is: a long op's kernels ask now and then, and the thread that called the op
// asks Python.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "../checks.h"

namespace lipfast {

// Lets Python handle signals that have come, and tells the calling thread's watcher, if there is one, which share of
// the work is done. True: one of them raised; `take_interrupt` has what.
bool python_interrupts(double share);

// The end of the message of what an interrupted op throws.
inline constexpr const char* kInterrupted = "interrupted by a signal";

// One call of an op. The thread that made it asks Python a few times a second, all others what that was told.
class Interrupts {
 public:
  // steps: of the whole call.
  explicit Interrupts(double steps)
      : steps_(steps), caller_(std::this_thread::get_id()), next_(Clock::now() + kPause) {}

  void count(int64_t steps) { done_.fetch_add(steps, std::memory_order_relaxed); }

  bool stop() {
    if (std::this_thread::get_id() == caller_ && Clock::now() >= next_ && !stopped_.load(std::memory_order_relaxed)) {
      const double share = static_cast<double>(done_.load(std::memory_order_relaxed)) / steps_;
      if (python_interrupts(share < 1 ? share : 1)) stopped_.store(true, std::memory_order_relaxed);
      next_ = Clock::now() + kPause;
    }
    return stopped_.load(std::memory_order_relaxed);
  }

  // A thread at work. The caller, when its own is done, waits for the others, and goes on asking Python.
  class Presence {
   public:
    explicit Presence(Interrupts& all) : all_(all) {
      const std::lock_guard<std::mutex> lock(all_.mutex_);
      ++all_.present_;
    }
    ~Presence() {
      std::unique_lock<std::mutex> lock(all_.mutex_);
      if (--all_.present_ == 0) all_.nobody_.notify_all();
      while (std::this_thread::get_id() == all_.caller_ &&
             !all_.nobody_.wait_for(lock, kPause, [this] { return all_.present_ == 0; })) {
        lock.unlock();
        all_.stop();
        lock.lock();
      }
    }
    Presence(const Presence&) = delete;
    Presence& operator=(const Presence&) = delete;

   private:
    Interrupts& all_;
  };

  void check(const char* op) const {
    STD_TORCH_CHECK(!stopped_.load(std::memory_order_relaxed), op, ": ", kInterrupted);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPause{100};
  const double steps_;
  const std::thread::id caller_;
  Clock::time_point next_;  // of the caller alone
  std::atomic<int64_t> done_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable nobody_;
  int64_t present_ = 0;
};

}  // namespace lipfast

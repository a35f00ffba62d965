// What the compiler's thread sanitizer calls, for CUDA threads; compiled without the sanitizer. See race_check.h.
#include "race_check.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <unordered_map>

namespace cuda_on_cpu {
namespace {

constexpr uintptr_t kCellBytes = 4;
constexpr uintptr_t kPageCells = 1024;

// One access, and when it was.
struct Stamp {
  uint32_t block = 0, thread = 0, warp_barriers = 0, block_barriers = 0, grid_barriers = 0;
  Access access = Access::kRead;
  const void* where = nullptr;  // nullptr: there was none
};

// What is known of 4 bytes: the last write, two reads by different threads, and whether a copy is on its way.
struct Cell {
  Stamp write, reads[2];
  const void* copied = nullptr;
};

struct Page {
  Cell cells[kPageCells];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = 0;
Page* last_page = nullptr;
RaceThread now;
bool watching = false;

Cell& cell_of(uintptr_t number) {
  const uintptr_t page = number / kPageCells;
  if (last_page == nullptr || page != last_number) {
    std::unique_ptr<Page>& known = pages[page];
    if (known == nullptr) known = std::make_unique<Page>();
    last_page = known.get();
    last_number = page;
  }
  return last_page->cells[number % kPageCells];
}

Stamp stamp(Access access, const void* where) {
  return {now.block, now.thread, now.warp_clock->barriers, now.block_clock->barriers, now.grid_clock->barriers,
          access,    where};
}

bool same_thread(const Stamp& a, const Stamp& b) { return a.block == b.block && a.thread == b.thread; }

// Whether no barrier stands between an earlier access and the present one.
bool concurrent(const Stamp& before, const Stamp& present) {
  if (before.where == nullptr || same_thread(before, present)) return false;
  if (before.block != present.block) return before.grid_barriers == present.grid_barriers;
  if (before.block_barriers != present.block_barriers) return false;
  return before.thread / 32 != present.thread / 32 || before.warp_barriers == present.warp_barriers;
}

const char* name(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "changes atomically";
}

[[noreturn]] void report(const Stamp& before, const Stamp& present, uintptr_t address) {
  std::fprintf(stderr,
               "cuda_on_cpu: race at %#zx: thread %u of block %u %s it (%p) and thread %u of block %u %s it (%p), no "
               "barrier between\n",
               static_cast<size_t>(address), before.thread, before.block, name(before.access), before.where,
               present.thread, present.block, name(present.access), present.where);
  std::fflush(stderr);
  std::_Exit(70);
}

[[noreturn]] void report_copy(const Stamp& present, const void* issued, uintptr_t address) {
  std::fprintf(
      stderr, "cuda_on_cpu: race at %#zx: thread %u of block %u %s it (%p), an unawaited copy (%p) writes it\n",
      static_cast<size_t>(address), present.thread, present.block, name(present.access), present.where, issued);
  std::fflush(stderr);
  std::_Exit(70);
}

void check(const Stamp& before, const Stamp& present, uintptr_t address) {
  const bool both_read = before.access == Access::kRead && present.access == Access::kRead;
  const bool both_atomic = before.access == Access::kAtomic && present.access == Access::kAtomic;
  if (!both_read && !both_atomic && concurrent(before, present)) report(before, present, address);
}

void remember_read(Cell& cell, const Stamp& present) {
  for (Stamp& read : cell.reads) {
    if (read.where == nullptr || same_thread(read, present) || !concurrent(read, present)) {
      read = present;
      return;
    }
  }
}

void access_cell(uintptr_t number, const Stamp& present) {
  Cell& cell = cell_of(number);
  const uintptr_t address = number * kCellBytes;
  if (cell.copied != nullptr) report_copy(present, cell.copied, address);
  check(cell.write, present, address);
  if (present.access == Access::kRead) return remember_read(cell, present);
  for (Stamp& read : cell.reads) {
    check(read, present, address);
    read = Stamp{};
  }
  cell.write = present;
}

void access(const void* from, size_t bytes, Access kind, const void* where) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  if (bytes == 0 || (address >= now.stack && address < now.stack_end)) return;
  const Stamp present = stamp(kind, where);
  for (uintptr_t at = address / kCellBytes; at <= (address + bytes - 1) / kCellBytes; ++at) access_cell(at, present);
}

// Calls body(cell) for the cells of [from, from + bytes).
template <class Body>
void each_cell(const void* from, size_t bytes, const Body& body) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t at = address / kCellBytes; at * kCellBytes < address + bytes; ++at) body(cell_of(at));
}

}  // namespace

void race_forget_everything() {
  pages.clear();
  last_page = nullptr;
}
void race_forget(const void* from, size_t bytes) {
  each_cell(from, bytes, [](Cell& cell) { cell = Cell{}; });
}
void race_run(const RaceThread& thread) { now = thread; }
bool race_watch(bool watch) {
  const bool before = watching;
  watching = watch;
  return before;
}
void race_access(const void* address, size_t bytes, Access kind) {
  access(address, bytes, kind, __builtin_return_address(0));
}
void race_copy_issued(const void* to, const void* from, size_t bytes) {
  const void* where = __builtin_return_address(0);
  access(from, bytes, Access::kRead, where);
  access(to, bytes, Access::kWrite, where);
  each_cell(to, bytes, [&](Cell& cell) { cell.copied = where; });
}
void race_copy_landed(const void* to, const void* from, size_t bytes) {
  const void* where = __builtin_return_address(0);
  each_cell(to, bytes, [](Cell& cell) { cell.copied = nullptr; });
  access(from, bytes, Access::kRead, where);
  access(to, bytes, Access::kWrite, where);
}

void race_reported(const void* address, size_t bytes, Access kind, const void* where) {
  if (watching) access(address, bytes, kind, where);
}

}  // namespace cuda_on_cpu

// The sanitizer's interface, as GCC and Clang call it.
#define LIPFAST_REPORT(kind) cuda_on_cpu::race_reported(address, bytes, kind, __builtin_return_address(0))
#define LIPFAST_HOOKS(size)                          \
  void __tsan_read##size(void* address) {            \
    const size_t bytes = size;                       \
    LIPFAST_REPORT(cuda_on_cpu::Access::kRead);      \
  }                                                  \
  void __tsan_write##size(void* address) {           \
    const size_t bytes = size;                       \
    LIPFAST_REPORT(cuda_on_cpu::Access::kWrite);     \
  }                                                  \
  void __tsan_unaligned_read##size(void* address) {  \
    const size_t bytes = size;                       \
    LIPFAST_REPORT(cuda_on_cpu::Access::kRead);      \
  }                                                  \
  void __tsan_unaligned_write##size(void* address) { \
    const size_t bytes = size;                       \
    LIPFAST_REPORT(cuda_on_cpu::Access::kWrite);     \
  }

extern "C" {
LIPFAST_HOOKS(1)
LIPFAST_HOOKS(2)
LIPFAST_HOOKS(4)
LIPFAST_HOOKS(8)
LIPFAST_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) { LIPFAST_REPORT(cuda_on_cpu::Access::kRead); }
void __tsan_write_range(void* address, size_t bytes) { LIPFAST_REPORT(cuda_on_cpu::Access::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

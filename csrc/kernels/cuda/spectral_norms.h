// clang-format off
// spectral_norms on CUDA: brackets of ||W||_2 for any number of dense row-major matrices, in at most three launches
//              beside the table's.
//
// Types        float32 or float64 entries; all products, vectors and sums in float64.
// Memory       matrices of up to kResidentBytes and kResidentColumns are a block's: it holds them in shared memory, reads
//              them once, and all that it writes between passes is in a part of the workspace that the next matrix uses
//              again. Larger ones are cut into work items that the whole grid shares.
// Lower        ||W v|| / ||v|| at the final vector, less its own rounding: never above the truth.
// Upper        with `certify`, Hoelder's or Frobenius' bound, rounded up: never below the truth, loose. The tight one
//              is cholesky_bounds' business. Otherwise +inf.
// Determinism  how a matrix is cut depends on its shape only, and every sum has a fixed order: results do not depend on
//              the grid, on the other matrices, or on timing.
// Host         nothing waits for the device; the table of matrices travels in kernel arguments, so that a captured CUDA
//              graph holds all that it needs. Matrices at equal distances in memory, of shapes that repeat (the layers of
//              stacked networks), take one launch for all of them.
// Errors       of launches: launch.cuh. Of values none: a NaN or infinite entry gives upper_method -1.
// clang-format on
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../params.h"

namespace lipfast::cuda {

constexpr int kSpectralThreads = 256;
constexpr int kMaxBasis = 120;           // Lanczos vectors kept before a restart
constexpr int64_t kItemBytes = 1 << 18;  // of W per work item
constexpr int64_t kMinItemRows = 16;  // an item's partial sums are one row of float64: they must stay the smaller part
constexpr int kChunkEntries = 22;     // entries that fit a kernel's arguments, with what they grow by
constexpr int64_t kFewItems = 4;      // up to so many partial sums are added by the block that needs them
constexpr int64_t kSumColumns = 32;   // of the others, columns that one block adds
// Matrices that one block holds, a third of them in shared memory at least: of two blocks on a multiprocessor, or of
// the only one.
constexpr int64_t kResidentColumns = 256;
constexpr int64_t kResidentBytes = 384 << 10;
constexpr int64_t kSmallResidentBytes = 64 << 10;
constexpr int64_t kResidentSlots = 320;  // blocks that have a part of the workspace, at most
constexpr int kSmallResidentThreads = 128;
constexpr int64_t kSmallResidentShared = 80 << 10;  // two blocks on every device of compute capability 8.0 and 9.0
constexpr int64_t kLargeResidentShared = 160 << 10;

// One matrix. A work item is a range of item_rows rows; a matrix that a block holds has none. `vectors` is where its
// part of the workspace begins: the basis (basis x cols), the next vector (cols), partial sums (items x cols), the
// bound of W v (rows).
struct SpectralEntry {
  const void* data;
  const double* start;  // cols values, or nullptr: seeded
  int64_t rows, cols;
  int64_t item_rows, items, first_item;
  int64_t vectors;
  int64_t right, left;  // where its singular vectors begin
  int32_t basis;
  int32_t sums;   // blocks that add its partial sums; 0: one does
  int32_t state;  // which of the states is its
  Dtype dtype;
};

// What an entry differs by from the one a period before.
struct SpectralStep {
  int64_t data, start;  // bytes
  int64_t first_item, vectors, right, left, state;
};

// Entries first, first + 1, ...: `period` of them, and again `repeats` times, each time a step further.
struct SpectralChunk {
  int64_t first, period, repeats;
  SpectralEntry entries[kChunkEntries];
  SpectralStep steps[kChunkEntries];
};

LIPFAST_SHARED const char* moved(const void* address, int64_t bytes) {
  return address == nullptr ? nullptr : static_cast<const char*>(address) + bytes;
}

LIPFAST_SHARED SpectralEntry entry_of(const SpectralChunk& chunk, int64_t at) {
  const int64_t repeat = at / chunk.period;
  const SpectralStep& step = chunk.steps[at % chunk.period];
  SpectralEntry entry = chunk.entries[at % chunk.period];
  entry.data = moved(entry.data, repeat * step.data);
  entry.start = reinterpret_cast<const double*>(moved(entry.start, repeat * step.start));
  entry.first_item += repeat * step.first_item;
  entry.vectors += repeat * step.vectors;
  entry.right += repeat * step.right;
  entry.left += repeat * step.left;
  entry.state += static_cast<int32_t>(repeat * step.state);
  return entry;
}

struct SpectralOptions {
  uint64_t seed;
  double tolerance;  // relative, on the square
  int32_t max_passes;
  bool power;
  bool certify;
};

// What the recurrence of one matrix carries from pass to pass.
struct SpectralState {
  double largest;  // |w_ij|, unscaled
  double scale;    // 2^-exponent; 1 of float32
  int32_t exponent;
  int32_t finite;
  int32_t size;  // vectors in the basis before the current one
  int32_t passes;
  int32_t check;  // size at which to look at the convergence next
  int32_t done;
  double diagonal[kMaxBasis];
  double off[kMaxBasis];
};

struct SpectralOutputs {
  double *lower, *upper;
  int64_t *passes, *upper_method;
  double *right, *left;
};

struct SpectralLaunch {
  const SpectralEntry* entries;
  int64_t count, items;
  SpectralState* states;
  int32_t* item_matrix;   // items
  int32_t* item_lists;    // 2 x items: the work of this step and of the next
  int32_t* matrix_lists;  // 2 x count
  int64_t* sum_lists;     // 2 x sums: matrix << 32 | part
  int64_t sums;
  int32_t* counters;  // 3 x (matrices, items, sums): of this step, of the next, and one to be cleared; zero at first
  int32_t* turns;     // per size of resident matrices, the next one; zero at first
  double* item_statistics;  // 3 x items
  double* vectors;
  double* slots;  // kResidentSlots x slot_size: what a block needs for a matrix that it holds
  int64_t slot_size;
  SpectralOptions options;
  SpectralOutputs out;
};

// Where everything lies in one workspace.
struct SpectralPlan {
  std::vector<SpectralEntry> entries;
  int64_t shared = 0;  // matrices that the whole grid shares
  int64_t items = 0, sums = 0, vectors = 0, right = 0, left = 0, slot_size = 0;
  int64_t resident[2] = {0, 0};  // matrices that a block holds: up to kSmallResidentBytes, and larger ones

  void add(const void* data, Dtype dtype, int64_t rows, int64_t cols, const double* start, bool may_reside = true,
           int64_t item_bytes = kItemBytes, int64_t min_item_rows = kMinItemRows) {
    SpectralEntry entry{};
    entry.data = data;
    entry.dtype = dtype;
    entry.start = start;
    entry.rows = rows;
    entry.cols = cols;
    const int64_t row_bytes = cols * (dtype == Dtype::kFloat32 ? 4 : 8);
    entry.item_rows = item_bytes / row_bytes > min_item_rows ? item_bytes / row_bytes : min_item_rows;
    const bool resides = may_reside && cols <= kResidentColumns && rows * row_bytes <= kResidentBytes;
    entry.items = resides ? 0 : (rows + entry.item_rows - 1) / entry.item_rows;
    entry.sums = static_cast<int32_t>(entry.items > kFewItems ? (cols + kSumColumns - 1) / kSumColumns : 0);
    entry.first_item = items;
    entry.state = static_cast<int32_t>(shared);
    entry.vectors = vectors;
    entry.right = right;
    entry.left = left;
    // From any start vector, the products with W^T W span at most as many dimensions as W has rows, and one more.
    const int64_t limit = cols > 2000 ? kMaxBasis : 64, dimensions = rows < cols ? rows + 1 : cols;
    entry.basis = static_cast<int32_t>(dimensions < limit ? dimensions : limit);
    items += entry.items;
    sums += entry.sums;
    if (resides) {
      const int64_t size = entry.basis * cols + rows;
      slot_size = slot_size < size ? size : slot_size;
      ++resident[rows * row_bytes > kSmallResidentBytes];
    } else {
      vectors += (entry.basis + 1 + entry.items) * cols + rows;
      ++shared;
    }
    right += cols;
    left += rows;
    entries.push_back(entry);
  }

  // At least what one more matrix adds to bytes().
  int64_t bytes_of(int64_t rows, int64_t cols, Dtype dtype) const {
    SpectralPlan grown;
    grown.add(nullptr, dtype, rows, cols, nullptr);
    const int64_t slots =
        resident[0] + resident[1] + 1 < kResidentSlots ? resident[0] + resident[1] + 1 : kResidentSlots;
    const int64_t growth = grown.slot_size > slot_size ? (grown.slot_size - slot_size) * slots : 0;
    return grown.bytes() + growth * static_cast<int64_t>(sizeof(double));
  }
  // The entries as few chunks.
  std::vector<SpectralChunk> chunks() const {
    std::vector<SpectralChunk> found;
    const auto count = static_cast<int64_t>(entries.size());
    for (int64_t first = 0; first < count; first += found.back().period * found.back().repeats) {
      SpectralChunk best = chunk_of(first, std::min<int64_t>(kChunkEntries, count - first), 1);
      for (int64_t period = 1; period <= kChunkEntries && first + 2 * period <= count; ++period) {
        const SpectralChunk chunk = chunk_of(first, period, count);
        if (chunk.period * chunk.repeats <= best.period * best.repeats) continue;
        best = chunk;
        if (first + chunk.period * chunk.repeats == count) break;
      }
      found.push_back(best);
    }
    return found;
  }
  // Bytes of workspace; place() cuts them. Everything is aligned to 16.
  int64_t bytes() const { return place(nullptr).second; }
  SpectralLaunch launch(char* base) const { return place(base).first; }

 private:
  // `period` entries from `first` on, as often as they repeat, `most` times at most.
  SpectralChunk chunk_of(int64_t first, int64_t period, int64_t most) const {
    SpectralChunk chunk{first, period, 1, {}, {}};
    const auto count = static_cast<int64_t>(entries.size());
    const SpectralEntry* from = entries.data() + first;
    std::copy_n(from, period, chunk.entries);
    if (most == 1 || first + 2 * period > count) return chunk;
    for (int64_t i = 0; i < period; ++i) chunk.steps[i] = step_between(from[i], from[i + period]);
    for (int64_t end = std::min(count - first, most * period), at = period; at < end; ++at) {
      if (!same(entry_of(chunk, at), from[at])) break;
      if ((at + 1) % period == 0) ++chunk.repeats;
    }
    return chunk;
  }
  static int64_t bytes_between(const void* before, const void* after) {
    return before == nullptr || after == nullptr
               ? 0
               : static_cast<int64_t>(reinterpret_cast<intptr_t>(after) - reinterpret_cast<intptr_t>(before));
  }
  static SpectralStep step_between(const SpectralEntry& a, const SpectralEntry& b) {
    return {bytes_between(a.data, b.data),
            bytes_between(a.start, b.start),
            b.first_item - a.first_item,
            b.vectors - a.vectors,
            b.right - a.right,
            b.left - a.left,
            b.state - a.state};
  }
  static bool same(const SpectralEntry& a, const SpectralEntry& b) {
    return a.data == b.data && a.start == b.start && a.rows == b.rows && a.cols == b.cols &&
           a.item_rows == b.item_rows && a.items == b.items && a.first_item == b.first_item && a.vectors == b.vectors &&
           a.right == b.right && a.left == b.left && a.basis == b.basis && a.sums == b.sums && a.state == b.state &&
           a.dtype == b.dtype;
  }

  std::pair<SpectralLaunch, int64_t> place(char* base) const {
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      char* at = base == nullptr ? nullptr : base + used;
      used += (size + 15) / 16 * 16;
      return at;
    };
    const auto count = static_cast<int64_t>(entries.size());
    SpectralLaunch launch{};
    launch.count = count;
    launch.items = items;
    launch.sums = sums;
    launch.slot_size = slot_size;
    launch.entries = reinterpret_cast<SpectralEntry*>(take(count * sizeof(SpectralEntry)));
    launch.states = reinterpret_cast<SpectralState*>(take(shared * sizeof(SpectralState)));
    launch.item_statistics = reinterpret_cast<double*>(take(3 * items * sizeof(double)));
    launch.vectors = reinterpret_cast<double*>(take(vectors * sizeof(double)));
    const int64_t held = resident[0] + resident[1], slots = held < kResidentSlots ? held : kResidentSlots;
    launch.slots = reinterpret_cast<double*>(take(slots * slot_size * sizeof(double)));
    launch.sum_lists = reinterpret_cast<int64_t*>(take(2 * sums * sizeof(int64_t)));
    launch.item_matrix = reinterpret_cast<int32_t*>(take(items * sizeof(int32_t)));
    launch.item_lists = reinterpret_cast<int32_t*>(take(2 * items * sizeof(int32_t)));
    launch.matrix_lists = reinterpret_cast<int32_t*>(take(2 * count * sizeof(int32_t)));
    launch.counters = reinterpret_cast<int32_t*>(take(9 * sizeof(int32_t)));
    launch.turns = reinterpret_cast<int32_t*>(take(2 * sizeof(int32_t)));
    return {launch, used};
  }
};

// Queues everything on `stream` (a cudaStream_t).
void launch_spectral_norms_cuda(const SpectralPlan& plan, const SpectralLaunch& launch, void* stream);

}  // namespace lipfast::cuda

// Passes of one block over some rows of a matrix: the work items of spectral_norms.
#pragma once

#include "device.cuh"

namespace lipfast::cuda {

constexpr int64_t kStageBytes = 32 << 10;  // rows of W that lie in shared memory at a time
constexpr int64_t kStagedRows = 64;        // rows at a time, at most

// Rows [0, count) of a dense row-major matrix, times 2^-e.
template <class T>
struct Rows {
  const T* data;
  int64_t count, cols;
  PowerOfTwo scaling;
};

// `count` contiguous values in shared memory, 16 bytes at a time: whatever the alignment of `from`, the copy is laid
// out with the same. buffer: 16-byte aligned, 16 bytes longer than the values. Begins without, ends with a barrier.
template <class T>
__device__ const T* stage(const T* from, int64_t count, char* buffer) {
  constexpr int64_t kPer16 = 16 / sizeof(T);
  const int64_t shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) % 16);
  T* to = reinterpret_cast<T*>(buffer + shift);
  const int64_t head = smaller<int64_t>(count, (16 - shift) % 16 / static_cast<int64_t>(sizeof(T)));
  const int64_t body = (count - head) / kPer16;
  for (int64_t i = thread(); i < body; i += threads()) copy_async<16>(to + head + i * kPer16, from + head + i * kPer16);
  copy_async_commit();
  for (int64_t i = thread(); i < head; i += threads()) to[i] = from[i];
  for (int64_t i = head + body * kPer16 + thread(); i < count; i += threads()) to[i] = from[i];
  copy_async_wait<0>();
  __syncthreads();
  return to;
}

// z = W^T (W v): each tile of rows is read once, into shared memory, and used twice. Rows too long for that are read
// again from the cache. y: kStagedRows doubles, buffer: kStageBytes + 16 bytes of shared memory. Ends with a barrier.
template <class T>
__device__ void gram_product(const Rows<T>& w, const double* v, double* z, double* y, char* buffer) {
  const int64_t fit = kStageBytes / (w.cols * static_cast<int64_t>(sizeof(T)));
  const int64_t height = fit > 0 ? smaller(fit, kStagedRows) : kStagedRows;
  for (int64_t first = 0; first < w.count; first += height) {
    const int64_t count = smaller(height, w.count - first);
    const T* tile = w.data + first * w.cols;
    if (fit > 0) tile = stage(tile, count * w.cols, buffer);
    for (int64_t i = warp(); i < count; i += warps()) {
      double sum = 0;
      for (int64_t j = lane(); j < w.cols; j += kWarp) sum += w.scaling(tile[i * w.cols + j]) * v[j];
      sum = warp_sum(sum);
      if (lane() == 0) y[i] = sum;
    }
    __syncthreads();
    for (int64_t j = thread(); j < w.cols; j += threads()) {
      double sum = first == 0 ? 0 : z[j];
      for (int64_t i = 0; i < count; ++i) sum += y[i] * w.scaling(tile[i * w.cols + j]);
      z[j] = sum;
    }
    __syncthreads();
  }
}

// Largest magnitude and whether all entries are finite, in thread 0.
template <class T>
__device__ void examine(const T* data, int64_t size, double* largest, double* finite, double* scratch) {
  double top = 0;
  int bad = 0;
  for (int64_t i = thread(); i < size; i += threads()) {
    const double magnitude = fabs(static_cast<double>(data[i]));
    bad |= !(magnitude < INFINITY);
    top = larger(top, magnitude);
  }
  const int bad_threads = __syncthreads_count(bad);
  top = block_max(top, scratch);
  if (thread() == 0) {
    *largest = top;
    *finite = bad_threads == 0;
  }
}

// y = W x, bound = |W| |x|, and for Hoelder's bound the column sums of |W|, and, in thread 0, the largest row sum and
// the sum of squares.
template <class T>
__device__ void certified_product(const Rows<T>& w, const double* x, double* y, double* bound, double* column_sums,
                                  double* largest_row, double* squares, double* scratch) {
  double top = 0, square_sum = 0;
  for (int64_t i = warp(); i < w.count; i += warps()) {
    double sum = 0, size = 0, row = 0;
    for (int64_t j = lane(); j < w.cols; j += kWarp) {
      const double entry = w.scaling(w.data[i * w.cols + j]), product = entry * x[j];
      sum += product;
      size += fabs(product);
      row += fabs(entry);
      square_sum += entry * entry;
    }
    sum = warp_sum(sum);
    size = warp_sum(size);
    top = larger(top, warp_sum(row));
    if (lane() == 0) {
      y[i] = sum;
      bound[i] = size;
    }
  }
  for (int64_t j = thread(); j < w.cols; j += threads()) {
    double sum = 0;
    for (int64_t i = 0; i < w.count; ++i) sum += fabs(w.scaling(w.data[i * w.cols + j]));
    column_sums[j] = sum;
  }
  top = block_max(top, scratch);
  square_sum = block_sum(square_sum, scratch);
  if (thread() == 0) {
    *largest_row = top;
    *squares = square_sum;
  }
}

}  // namespace lipfast::cuda

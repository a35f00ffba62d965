// Passes of one block over some rows of a matrix: the work items of spectral_norms.
#pragma once

#include "device.cuh"

namespace lipfast::cuda {

constexpr int64_t kStageBytes = 32 << 10;  // rows of W that lie in shared memory at a time
constexpr int64_t kStagedRows = 64;        // rows at a time, at most
constexpr int kOwnColumns = 4;             // of a product W^T y that a thread keeps in registers

// Rows [0, count) of a dense row-major matrix, times a power of two where they are float64: squares and sums of float32
// neither overflow in float64 nor come near its denormal numbers. The first `held` rows lie in shared memory, too.
template <class T>
struct Rows {
  const T* data;
  int64_t count, cols;
  double scale;
  const T* tile = nullptr;
  int64_t held = 0;

  __device__ const T* row(int64_t i) const { return (i < held ? tile : data) + i * cols; }
  __device__ double entry(float value) const { return value; }
  __device__ double entry(double value) const { return value * scale; }
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
// again from the cache. A thread keeps its columns of z in registers, as far as kOwnColumns reaches. y: kStagedRows
// doubles, buffer: kStageBytes + 16 bytes of shared memory; both are free when it returns, z is not yet seen by others.
template <class T>
__device__ void gram_product(const Rows<T>& w, const double* v, double* z, double* y, char* buffer) {
  const int64_t fit = kStageBytes / (w.cols * static_cast<int64_t>(sizeof(T)));
  const int64_t height = fit > 0 ? smaller(fit, kStagedRows) : kStagedRows;
  double own[kOwnColumns] = {};
  for (int64_t first = 0; first < w.count; first += height) {
    const int64_t count = smaller(height, w.count - first);
    const T* tile = w.data + first * w.cols;
    if (fit > 0) tile = stage(tile, count * w.cols, buffer);
    for (int64_t i = warp(); i < count; i += warps()) {
      double sum = 0;
      for (int64_t j = lane(); j < w.cols; j += kWarp) sum += w.entry(tile[i * w.cols + j]) * v[j];
      sum = warp_sum(sum);
      if (lane() == 0) y[i] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kOwnColumns; ++c) {
      const int64_t j = thread() + c * threads();
      if (j >= w.cols) break;
      for (int64_t i = 0; i < count; ++i) own[c] += y[i] * w.entry(tile[i * w.cols + j]);
    }
    for (int64_t j = thread() + kOwnColumns * threads(); j < w.cols; j += threads()) {
      double sum = first == 0 ? 0 : z[j];
      for (int64_t i = 0; i < count; ++i) sum += y[i] * w.entry(tile[i * w.cols + j]);
      z[j] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kOwnColumns; ++c) {
    const int64_t j = thread() + c * threads();
    if (j < w.cols) z[j] = own[c];
  }
}

// Largest magnitude and whether all entries are finite, in thread 0.
template <class T>
__device__ void examine(const Rows<T>& w, double* largest, double* finite, double* scratch) {
  double top = 0;
  int bad = 0;
  for (int64_t i = warp(); i < w.count; i += warps()) {
    const T* row = w.row(i);
    for (int64_t j = lane(); j < w.cols; j += kWarp) {
      const double magnitude = fabs(static_cast<double>(row[j]));
      bad |= !(magnitude < INFINITY);
      top = larger(top, magnitude);
    }
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
    const T* row = w.row(i);
    double sum = 0, size = 0, row_sum = 0;
    for (int64_t j = lane(); j < w.cols; j += kWarp) {
      const double entry = w.entry(row[j]), product = entry * x[j];
      sum += product;
      size += fabs(product);
      row_sum += fabs(entry);
      square_sum += entry * entry;
    }
    sum = warp_sum(sum);
    size = warp_sum(size);
    top = larger(top, warp_sum(row_sum));
    if (lane() == 0) {
      y[i] = sum;
      bound[i] = size;
    }
  }
  for (int64_t j = thread(); j < w.cols; j += threads()) {
    double sum = 0;
    for (int64_t i = 0; i < w.count; ++i) sum += fabs(w.entry(w.row(i)[j]));
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

// A tile of a product M N^* by one block of kTileThreads threads: rows of M and of N come to shared memory a few
// columns at a time, and every thread sums kEach x kEach entries. Plain sums of products in float64, in a fixed order.
#pragma once

#include "device.cuh"
#include "tiles.h"
#include "wide_matrices.h"

namespace lipfast::cuda {

constexpr int64_t kTileThreads = 256;
constexpr unsigned kTileAcross = 16;  // threads along an edge of a tile
constexpr unsigned kTileDepth = 16;   // columns in shared memory at a time
constexpr int64_t kSmallSide = 48;    // up to here edges of 32 waste less than edges of 64 gain

struct alignas(16) Complex {
  double re, im;
};

// sum += a conj(b)
__device__ inline void add_product(double a, double b, double& sum) { sum += a * b; }
__device__ inline void add_product(const Complex& a, const Complex& b, Complex& sum) {
  sum.re += a.re * b.re;
  sum.re += a.im * b.im;
  sum.im += a.im * b.re;
  sum.im -= a.re * b.im;
}

// Matrices that can be factors: their entries, how many columns there are in rows before `last`, and whether the
// entries of a row lie closer together than those of a column. The first is row-major.
template <class Value>
struct RowMajor {
  using Number = Value;
  const Number* data;
  int64_t length;

  __device__ int64_t columns(int64_t /*last*/) const { return length; }
  __device__ static constexpr bool along_rows() { return true; }
  __device__ Number at(int64_t i, int64_t j) const { return data[i * length + j]; }
};

// A square one of which only the lower triangle is read; the rest counts as zero.
template <class Value>
struct LowerTriangle {
  using Number = Value;
  const Number* data;
  int64_t side;

  __device__ int64_t columns(int64_t last) const { return smaller(side, last); }
  __device__ static constexpr bool along_rows() { return true; }
  __device__ Number at(int64_t i, int64_t j) const { return j <= i ? data[i * side + j] : Number{}; }
};

// One of any strides, times a power of two.
template <class T>
struct Scaled {
  using Number = double;
  const T* data;
  int64_t length, row_step, column_step;
  double scale;

  __device__ Scaled(const WideMatrices& all, int64_t matrix, double scale)
      : data(static_cast<const T*>(all.data) + matrix * all.step),
        length(all.length),
        row_step(all.row_step),
        column_step(all.column_step),
        scale(scale) {}
  __device__ int64_t columns(int64_t /*last*/) const { return length; }
  __device__ bool along_rows() const { return column_step <= row_step; }
  __device__ double at(int64_t i, int64_t j) const {
    return static_cast<double>(data[i * row_step + j * column_step]) * scale;
  }
};

// Numbers of a row in shared memory: 16 bytes more than there are, so that neighbouring rows begin in other banks and
// two doubles move at once.
template <class Number>
constexpr int kPanelStride = kTileDepth + 16 / sizeof(Number);

template <class Number, int kEach>
struct alignas(16) TilePanels {
  Number left[kTileAcross * kEach][kPanelStride<Number>], right[kTileAcross * kEach][kPanelStride<Number>];
};

// What a thread sums: rows row(r) of the tile and columns column(c), kTileAcross apart, so that neighbouring threads
// read neighbouring rows.
template <class Number, int kEach>
struct TileSums {
  Number at[kEach][kEach] = {};

  __device__ static unsigned row(unsigned r) { return threadIdx.x / kTileAcross + kTileAcross * r; }
  __device__ static unsigned column(unsigned c) { return threadIdx.x % kTileAcross + kTileAcross * c; }
};

// First row and column of a tile of the lower triangle: its number is i (i + 1) / 2 + j.
struct TilePlace {
  int64_t row, column;
};
__device__ inline TilePlace lower_tile(int64_t tile, int64_t edge) {
  int64_t i = 0;
  while (tile > i) tile -= ++i;
  return {i * edge, tile * edge};
}

// Rows of a matrix from (row, column) on; zeros beyond `side` rows and `columns` columns. Neighbouring threads read
// what lies together.
template <int kEach, class Matrix, class Number>
__device__ __forceinline__ void load_panel(const Matrix& from, int64_t side, int64_t columns, int64_t row,
                                           int64_t column, Number (*to)[kPanelStride<Number>]) {
  constexpr unsigned kEdge = kTileAcross * kEach;
  const bool along = from.along_rows();
  for (unsigned at = threadIdx.x; at < kEdge * kTileDepth; at += blockDim.x) {
    const unsigned r = along ? at / kTileDepth : at % kEdge, c = along ? at % kTileDepth : at / kEdge;
    const int64_t i = row + r, j = column + c;
    to[r][c] = i < side && j < columns ? from.at(i, j) : Number{};
  }
}

// Columns that are summed without a branch between, as far as registers allow.
template <class Number, int kEach>
constexpr int kTogether = kEach > 2            ? 2
                          : sizeof(Number) > 8 ? 4
                                               : kTileDepth;

// sums += the tile at `place` of left right^*, both with `side` rows.
template <class Matrix, class Number, int kEach>
__device__ __forceinline__ void add_products(const Matrix& left, const Matrix& right, int64_t side,
                                             const TilePlace& place, TilePanels<Number, kEach>& panels,
                                             TileSums<Number, kEach>& sums) {
  constexpr int64_t kEdge = kTileAcross * kEach;
  const int64_t columns = smaller(left.columns(place.row + kEdge), right.columns(place.column + kEdge));
  for (int64_t k = 0; k < columns; k += kTileDepth) {
    load_panel<kEach>(left, side, columns, place.row, k, panels.left);
    load_panel<kEach>(right, side, columns, place.column, k, panels.right);
    __syncthreads();
#pragma unroll(kTogether<Number, kEach>)
    for (unsigned d = 0; d < kTileDepth; ++d) {
      Number a[kEach], b[kEach];
      for (int r = 0; r < kEach; ++r) a[r] = panels.left[sums.row(r)][d];
      for (int c = 0; c < kEach; ++c) b[c] = panels.right[sums.column(c)][d];
      for (int r = 0; r < kEach; ++r) {
        for (int c = 0; c < kEach; ++c) add_product(a[r], b[c], sums.at[r][c]);
      }
    }
    __syncthreads();
  }
}

}  // namespace lipfast::cuda

// A tile of a product M N^* by one block of kTileThreads threads: rows of M and of N come to shared memory a few
// columns at a time, and every thread sums kEach x kEach entries. Plain sums of products in float64, in a fixed order.
#pragma once

#include "device.cuh"

namespace lipfast::cuda {

constexpr int64_t kTileThreads = 256;
constexpr int64_t kTileAcross = 16;  // threads along an edge of a tile
constexpr int64_t kTileDepth = 16;   // columns in shared memory at a time
constexpr int64_t kSmallSide = 48;   // up to here edges of 32 waste less than edges of 64 gain

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

template <class Number, int kEach>
struct TilePanels {
  // One column more than there is: neighbouring rows begin in other banks.
  Number left[kTileAcross * kEach][kTileDepth + 1], right[kTileAcross * kEach][kTileDepth + 1];
};

// What a thread sums: rows row(r) of the tile and columns column(c), kTileAcross apart, so that neighbouring threads
// read neighbouring rows.
template <class Number, int kEach>
struct TileSums {
  Number at[kEach][kEach] = {};

  __device__ static int64_t row(int r) { return thread() / kTileAcross + kTileAcross * r; }
  __device__ static int64_t column(int c) { return thread() % kTileAcross + kTileAcross * c; }
};

// How many tiles of an edge matrices of a side are cut into: along an edge, and in the lower triangle.
LIPFAST_SHARED int64_t tiles_across(int64_t side, int64_t edge) { return (side + edge - 1) / edge; }
LIPFAST_SHARED int64_t lower_tiles(int64_t side, int64_t edge) {
  const int64_t across = tiles_across(side, edge);
  return across * (across + 1) / 2;
}

// First row and column of a tile of the lower triangle: its number is i (i + 1) / 2 + j.
struct TilePlace {
  int64_t row, column;
};
__device__ inline TilePlace lower_tile(int64_t tile, int64_t edge) {
  int64_t i = 0;
  while (tile > i) tile -= ++i;
  return {i * edge, tile * edge};
}

// Rows of a row-major matrix from (row, column) on; zeros beyond `side` rows, `length` columns, and above the diagonal
// of a triangular one.
template <int kEach, class Number>
__device__ void load_panel(const Number* from, int64_t side, int64_t length, bool triangular, int64_t row,
                           int64_t column, Number (*to)[kTileDepth + 1]) {
  for (int64_t at = thread(); at < kTileAcross * kEach * kTileDepth; at += threads()) {
    const int64_t i = row + at / kTileDepth, j = column + at % kTileDepth;
    const bool inside = i < side && j < length && (!triangular || j <= i);
    to[at / kTileDepth][at % kTileDepth] = inside ? from[i * length + j] : Number{};
  }
}

// sums += the tile at `place` of left right^*, both side x length, or both lower triangular.
template <class Number, int kEach>
__device__ void add_products(const Number* left, const Number* right, int64_t side, int64_t length, bool triangular,
                             const TilePlace& place, TilePanels<Number, kEach>& panels, TileSums<Number, kEach>& sums) {
  const int64_t edge = kTileAcross * kEach;
  const int64_t end = triangular ? smaller(length, smaller(place.row, place.column) + edge) : length;
  for (int64_t k = 0; k < end; k += kTileDepth) {
    load_panel<kEach>(left, side, length, triangular, place.row, k, panels.left);
    load_panel<kEach>(right, side, length, triangular, place.column, k, panels.right);
    __syncthreads();
#pragma unroll 4
    for (int64_t d = 0; d < kTileDepth; ++d) {
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

// Tiles of products M M^T in float64, of matrices of any strides and of triangular ones: what shifted_grams and
// cholesky_bounds share. cholesky_residual has its own: for a row-major float64 matrix alone they take fewer registers.
#pragma once

#include "device.cuh"

namespace lipfast::cuda {

constexpr int64_t kGramTile = 32;  // rows and columns of a tile; two of each are a thread's
constexpr int64_t kGramThreads = 256;
constexpr int64_t kGramDepth = 16;  // columns of M in shared memory at a time

// Tiles of the lower triangle of a matrix with `side` rows.
__host__ __device__ inline int64_t gram_tiles(int64_t side) {
  const int64_t edge = (side + kGramTile - 1) / kGramTile;
  return edge * (edge + 1) / 2;
}

struct GramShared {
  double scratch[kMaxWarps];
  double a[kGramTile][kGramDepth + 1], b[kGramTile][kGramDepth + 1];
};

// What one thread sums: two rows and two columns of a tile.
struct GramSums {
  double at[2][2] = {};
};

// A matrix with `length` columns, row-major; of a triangular one, what is above the diagonal counts as zero.
struct GramRows {
  const double* data;
  int64_t length;
  bool triangular;

  __device__ bool along_rows() const { return true; }
  __device__ double at(int64_t i, int64_t j) const { return triangular && j > i ? 0 : data[i * length + j]; }
};

// A matrix of any strides times a power of two.
template <class T>
struct GramScaled {
  const T* data;
  int64_t row_step, column_step;
  double scale;

  __device__ bool along_rows() const { return column_step <= row_step; }
  __device__ double at(int64_t i, int64_t j) const {
    return static_cast<double>(data[i * row_step + j * column_step]) * scale;
  }
};

// kGramTile rows from `row` on and kGramDepth columns from `column` on; zeros beyond `side` rows and `length` columns.
// Neighbouring threads read what lies together.
template <class Source>
__device__ __forceinline__ void load_gram_tile(const Source& from, int64_t side, int64_t length, int64_t row,
                                               int64_t column, double (*to)[kGramDepth + 1]) {
  constexpr unsigned kTile = kGramTile, kDepth = kGramDepth;
  const bool along = from.along_rows();
  for (unsigned at = threadIdx.x; at < kTile * kDepth; at += blockDim.x) {
    const unsigned i = along ? at / kDepth : at % kTile, j = along ? at % kDepth : at / kTile;
    to[i][j] = row + i < side && column + j < length ? from.at(row + i, column + j) : 0;
  }
}

// sums += the tile (row, column) of M M^T, row >= column; of M the first `end` columns.
template <class Source>
__device__ __forceinline__ void add_gram_products(const Source& m, int64_t side, int64_t end, int64_t row,
                                                  int64_t column, GramShared& shared, GramSums& sums) {
  constexpr unsigned kHalf = kGramTile / 2;
  const unsigned i = 2 * (threadIdx.x / kHalf), j = 2 * (threadIdx.x % kHalf);
  for (int64_t k = 0; k < end; k += kGramDepth) {
    load_gram_tile(m, side, end, row, k, shared.a);
    load_gram_tile(m, side, end, column, k, shared.b);
    __syncthreads();
    for (int d = 0; d < kGramDepth; ++d) {
      for (int r = 0; r < 2; ++r) {
        for (int c = 0; c < 2; ++c) sums.at[r][c] += shared.a[i + r][d] * shared.b[j + c][d];
      }
    }
    __syncthreads();
  }
}

// Where a tile of the lower triangle begins, by its number edge (edge + 1) / 2 + position.
struct GramPlace {
  static constexpr unsigned kHalf = kGramTile / 2;
  int64_t row, column;

  __device__ explicit GramPlace(int64_t tile) {
    int64_t edge = 0;
    while (tile > edge) tile -= ++edge;
    row = edge * kGramTile;
    column = tile * kGramTile;
  }
  // The entries that are this thread's: 0 to 1 each.
  __device__ int64_t row_of(int r) const { return row + 2 * (threadIdx.x / kHalf) + r; }
  __device__ int64_t column_of(int c) const { return column + 2 * (threadIdx.x % kHalf) + c; }
};

// Sum of squares of the tile of t I - `sums`, twice off the diagonal, and its part of the trace of `sums`.
__device__ __forceinline__ void write_residual(const GramPlace& place, const GramSums& sums, int64_t side, double shift,
                                               GramShared& shared, double* out) {
  double squares = 0, trace = 0;
  for (int r = 0; r < 2; ++r) {
    for (int c = 0; c < 2; ++c) {
      const int64_t i = place.row_of(r), j = place.column_of(c);
      if (i >= side || j >= side) continue;
      const double residual = (i == j ? shift : 0) - sums.at[r][c];
      squares += residual * residual;
      trace += i == j ? sums.at[r][c] : 0;
    }
  }
  squares = block_sum(squares, shared.scratch);
  trace = block_sum(trace, shared.scratch);
  if (thread() == 0) {
    out[0] = place.row == place.column ? squares : 2 * squares;
    out[1] = trace;
  }
}

}  // namespace lipfast::cuda

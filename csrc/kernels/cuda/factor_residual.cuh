// How far a Hermitian matrix is from B B^* + L L^*, tile by tile of its lower triangle: what turns a factor L by any
// library into a proof.
#pragma once

#include "tile_products.cuh"

namespace lipfast::cuda {

constexpr int kResidualEach = 2;  // rows and columns of a tile that are a thread's
static_assert(kResidualTile == kTileAcross * kResidualEach);

template <class Number>
struct ResidualShared {
  double scratch[kMaxWarps];
  TilePanels<Number, kResidualEach> panels;
};

__device__ inline double real_part(double value) { return value; }
__device__ inline double real_part(const Complex& value) { return value.re; }

// |a - b|^2; on the diagonal, which is real, that of the real parts.
__device__ inline double squared_distance(double a, double b, bool /*diagonal*/) { return (a - b) * (a - b); }
__device__ inline double squared_distance(const Complex& a, const Complex& b, bool diagonal) {
  const double re = a.re - b.re, im = diagonal ? 0 : a.im - b.im;
  return re * re + im * im;
}

// Writes two sums over a tile: of squares of R = fl(A - B B^* - L L^*), those below the diagonal counted twice, and of
// the diagonal of B B^* + L L^*, whose trace is ||B||_F^2 + ||L||_F^2. a(i, j): an entry of A's lower triangle.
template <class Entry, class Matrix, class Number>
__device__ __forceinline__ void write_residual(const Entry& a, const Matrix& b, const LowerTriangle<Number>& factor,
                                               const TilePlace& place, ResidualShared<Number>& shared, double* out) {
  const int64_t side = factor.side;
  TileSums<Number, kResidualEach> sums;
  add_products(b, b, side, place, shared.panels, sums);
  add_products(factor, factor, side, place, shared.panels, sums);
  double squares = 0, trace = 0;
  for (int r = 0; r < kResidualEach; ++r) {
    for (int c = 0; c < kResidualEach; ++c) {
      const int64_t i = place.row + sums.row(r), j = place.column + sums.column(c);
      if (i >= side || j > i) continue;
      squares += (i == j ? 1 : 2) * squared_distance(a(i, j), sums.at[r][c], i == j);
      trace += i == j ? real_part(sums.at[r][c]) : 0;
    }
  }
  squares = block_sum(squares, shared.scratch);
  trace = block_sum(trace, shared.scratch);
  if (thread() == 0) {
    out[0] = squares;
    out[1] = trace;
  }
}

}  // namespace lipfast::cuda

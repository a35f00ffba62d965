// Body of symbol_grams; the contract is in symbol_grams.h.
#pragma once

#include "symbol_grams.h"
#include "tile_products.cuh"

namespace lipfast::cuda {

constexpr int64_t kSymbolTile = kWarp;  // a row of a tile is a warp's
constexpr int kSymbolRows = 4;          // of a tile, that a thread has
constexpr int64_t kSymbolPhases = 64;   // in shared memory at a time
constexpr int64_t kSymbolThreads = kSymbolTile * kSymbolTile / kSymbolRows;

struct SymbolGramsShared {
  double cosines[kSymbolPhases], sines[kSymbolPhases];
  double opposite[kSymbolTile][kSymbolTile + 1];  // of R_j^T
  Complex below[kSymbolTile][kSymbolTile + 1];
};

// Phases of differences from `first` on.
__device__ inline void load_phases(const SymbolGramsParams& p, const int64_t* centre, int64_t first,
                                   SymbolGramsShared& shared) {
  for (int64_t at = thread(); at < kSymbolPhases && first + at < p.axes.differences(); at += threads()) {
    const TapOffset j = p.axes.difference(first + at);
    double turns = 0;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t steps = centre[axis] * j.at[axis] % p.periods[axis];
      turns += static_cast<double>(steps) / static_cast<double>(p.periods[axis]);
    }
    sincospi(2 * (turns - rint(turns)), &shared.sines[at], &shared.cosines[at]);
  }
}

// R_j's tile whose mirror image is at `place`, or what there is of it.
__device__ inline void load_opposite(const double* product, int64_t rows, const TilePlace& place,
                                     SymbolGramsShared& shared) {
  const int64_t column = place.row + lane();
  for (int64_t row = warp(); row < kSymbolTile; row += warps()) {
    const bool inside = place.column + row < rows && column < rows;
    shared.opposite[row][lane()] = inside ? product[(place.column + row) * rows + column] : 0;
  }
}

// The tile at `place` of G, rows warp(), warp() + 8, ... of it.
__device__ inline void sum_gram(const SymbolGramsParams& p, const double* products, const int64_t* centre,
                                const TilePlace& place, SymbolGramsShared& shared, Complex (&sums)[kSymbolRows]) {
  for (int64_t j = 0; j < p.axes.differences(); ++j) {
    const int64_t at = j % kSymbolPhases;
    if (at == 0) load_phases(p, centre, j, shared);
    const double* product = products + j * p.rows * p.rows;
    load_opposite(product, p.rows, place, shared);
    __syncthreads();
    const double cosine = shared.cosines[at], sine = shared.sines[at];
    for (int r = 0; r < kSymbolRows; ++r) {
      const int64_t i = warp() + r * (kSymbolTile / kSymbolRows), row = place.row + i, column = place.column + lane();
      if (row >= p.rows || column > row) continue;
      const double entry = product[row * p.rows + column], mirrored = shared.opposite[lane()][i];
      if (j == 0) {
        sums[r].re = entry;
      } else {
        sums[r].re += cosine * (entry + mirrored);
        sums[r].im += sine * (entry - mirrored);
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSymbolThreads) symbol_grams_kernel(SymbolGramsParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<SymbolGramsShared*>(memory);
  const int64_t size = p.rows * p.rows;
  // Frequencies of one symbol follow each other: they read a tile of the products at about the same time.
  for (int64_t at = blockIdx.x; at < p.count * tiles; at += gridDim.x) {
    const int64_t index = at % p.count;
    const TilePlace place = lower_tile(at / p.count, kSymbolTile);
    Complex sums[kSymbolRows] = {};
    sum_gram(p, p.products + p.symbols[index] * p.axes.differences() * size, p.centres + 3 * index, place, shared,
             sums);
    auto* out = reinterpret_cast<Complex*>(p.out) + index * size;
    for (int r = 0; r < kSymbolRows; ++r) {
      const int64_t i = warp() + r * (kSymbolTile / kSymbolRows), row = place.row + i, column = place.column + lane();
      const bool diagonal = row == column;
      const Complex entry{(diagonal ? p.shifts[index] : 0) - sums[r].re, diagonal ? 0 : -sums[r].im};
      shared.below[i][lane()] = entry;
      if (row < p.rows && column <= row) out[row * p.rows + column] = entry;
    }
    __syncthreads();
    for (int r = 0; r < kSymbolRows; ++r) {
      const int64_t i = warp() + r * (kSymbolTile / kSymbolRows), row = place.column + i, column = place.row + lane();
      const Complex entry = shared.below[lane()][i];
      if (column < p.rows && row < column) out[row * p.rows + column] = {entry.re, -entry.im};
    }
    // The next tile's first barrier stands between this and what is written to `below` again.
  }
}

}  // namespace lipfast::cuda

// How Hermitian matrices lie in memory: lower triangles, one by one or one per vector lane.
#ifndef LIPFAST_HERMITIAN_INL_H
#define LIPFAST_HERMITIAN_INL_H

#include "vector-inl.h"

constexpr int kComplexRows = LIPFAST_VECTOR_BYTES == 64 ? 4 : 2;  // rows of a register tile of complex numbers
constexpr int kComplexPanel = 2 * kDoubles;                       // columns of one

// Packed: real and imaginary parts each a triangle whose rows are filled with zeros to a multiple of 8. Where row i
// starts, and the doubles of all n.
LIPFAST_INLINE int64_t packed_row(int64_t i) {
  const int64_t q = i / 8;
  return 32 * q * (q + 1) + (i % 8) * 8 * (q + 1);
}
LIPFAST_INLINE int64_t packed_triangle_size(int64_t n) { return packed_row(n); }

// kDoubles small matrices at once, one per lane, real and imaginary parts in turn. Rows are packed in multiples of
// kLaneTile.
constexpr int kLaneTile = LIPFAST_VECTOR_BYTES == 64 ? 3 : 2;

LIPFAST_INLINE int64_t lane_row(int64_t i) {
  const int64_t q = i / kLaneTile;
  return kLaneTile * (kLaneTile * q * (q + 1) / 2 + (i % kLaneTile) * (q + 1));
}
// Doubles of the matrices of all lanes.
LIPFAST_INLINE int64_t lanes_size(int64_t n) { return lane_row(round_up(n, kLaneTile)) * 2 * kDoubles; }

#endif

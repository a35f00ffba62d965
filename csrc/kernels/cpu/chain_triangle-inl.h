// The Jacobian H W of a chain that starts with a wide linear stage W has the singular values of H L, where L is the
// triangle with L L^T = W W^T: Cholesky's factor of the Gram matrix, both in float64. As H L is of the size of H W,
// nothing is lost by rounding L to float32; H (W W^T) H^T in float32 would lose twice the digits.
#ifndef LIPFAST_CHAIN_TRIANGLE_INL_H
#define LIPFAST_CHAIN_TRIANGLE_INL_H

#include "cholesky-inl.h"
#include "gram-inl.h"
#include "panel_product-inl.h"

// Worth it when the products saved outweigh the Gram matrix: a multiplication there costs about four of those.
LIPFAST_INLINE bool triangle_pays(const ChainParams& p, const ChainStage& stage) {
  const double units = static_cast<double>(stage.out.channels), inputs = static_cast<double>(stage.in.channels);
  const double outputs = static_cast<double>(elements(p.out));
  const double rows = static_cast<double>(p.batch) * outputs;
  return p.dtype == Dtype::kFloat32 && inputs > units && rows * (inputs - 0.5 * units) > 4 * units * (inputs + units);
}

// The Gram matrix is the sum of those of kSlices slices of columns, which threads share.
constexpr int64_t kSlices = 2;

inline int64_t triangle_slice_size(int64_t units) { return square_size(units) + gram_panels_size(units); }
inline int64_t triangle_size(int64_t units) {
  return kSlices * triangle_slice_size(units) + units + cholesky_panels_size(units);
}

// Adds up slice `slice` of W's columns, in its part of `work`.
inline void triangle_slice(const float* w, int64_t units, int64_t inputs, int64_t slice, double* work) {
  double *a = work + slice * triangle_slice_size(units), *panels = a + square_size(units);
  const int64_t begin = slice * inputs / kSlices, end = (slice + 1) * inputs / kSlices;
  if (begin == end) memset(a, 0, sizeof(double) * static_cast<size_t>(square_size(units)));
  for (int64_t k0 = begin; k0 < end; k0 += kGramDepth) {
    const int64_t depth = smaller(kGramDepth, end - k0);
    for (int64_t j = 0; j * kPanel < units; ++j) {
      pack_panel(w, units, inputs, PowerOfTwo{1, 1}, k0, depth, j, panels + j * kPanel * depth);
    }
    for (int64_t i = 0; i < units; i += kGramRows) gram_rows(a, units, i, panels, depth, k0 > begin);
  }
}

// Rows of the triangle that one item of work takes; a multiple of every panel's width.
constexpr int64_t kTriangleRows = 32;

// a: minus the sum of the slices above the diagonal, which is what cholesky() factors, and the sum on it.
inline void add_slices(int64_t units, int64_t begin, double* a) {
  const int64_t ld = leading_dimension(units), slice = triangle_slice_size(units);
  for (int64_t i = begin; i < smaller(units, begin + kTriangleRows); ++i) {
    double* row = a + i * ld;
    for (int64_t j = i; j < units; ++j) {
      for (int64_t other = 1; other < kSlices; ++other) row[j] += row[other * slice + j];
    }
    for (int64_t j = i + 1; j < units; ++j) row[j] = -row[j];
  }
}

// Columns [begin, begin + kTriangleRows) of L as rounded panels.
inline void pack_factor(const double* a, const double* diagonal, int64_t units, int64_t begin, float* packed) {
  const int64_t ld = leading_dimension(units);
  packed += units * begin;
  for (int64_t j = begin; j < smaller(units, begin + kTriangleRows); j += kColumns<float>) {
    const int64_t width = panel_width<float>(units - j);
    memset(packed, 0, sizeof(float) * static_cast<size_t>(j * width));
    packed += j * width;
    for (int64_t i = j; i < units; ++i, packed += width) {
      const int64_t below = smaller(width, i - j);
      for (int64_t k = 0; k < below; ++k) packed[k] = static_cast<float>(a[i * ld + j + k]);
      for (int64_t k = below; k < width; ++k) packed[k] = 0;
      if (below < width) packed[below] = static_cast<float>(diagonal[i]);
    }
  }
}

// The columns of L in panels, from the slices; zero where W is, NaN where W is not finite.
inline void pack_triangle(int64_t units, float* packed, double* work, const Parallel* parallel) {
  const int64_t ld = leading_dimension(units), blocks = (units + kTriangleRows - 1) / kTriangleRows;
  double *a = work, *diagonal = work + kSlices * triangle_slice_size(units), *panels = diagonal + units, trace = 0;
  for_items(parallel, blocks, [&](int64_t block) { add_slices(units, block * kTriangleRows, a); });
  for (int64_t i = 0; i < units; ++i) trace += a[i * ld + i];
  const bool regular = trace > 0 && trace < INFINITY;
  bool done = false;
  // W W^T may be singular: the least shift that the rounding of both steps asks for, relative to its trace.
  for (double shift = 1e-15 * trace; regular && !done; shift *= 8) {
    for (int64_t i = 0; i < units; ++i) diagonal[i] = a[i * ld + i] + shift;
    done = cholesky(a, units, diagonal, panels, parallel);
  }
  if (regular) {
    for_items(parallel, blocks, [&](int64_t block) { pack_factor(a, diagonal, units, block * kTriangleRows, packed); });
    return;
  }
  const auto fill = static_cast<float>(trace == 0 ? 0 : NAN);
  for (int64_t i = 0; i < packed_size<float>(units, units); ++i) packed[i] = fill;
}

#endif

// Products of a few rows with a matrix that is packed in column panels, over a list of the terms that count.
//
// A panel is two vectors wide, the last one a single vector where that suffices: [row][width], zero-padded.
#ifndef LIPFAST_PANEL_PRODUCT_INL_H
#define LIPFAST_PANEL_PRODUCT_INL_H

#include "vector-inl.h"

constexpr int kRowTile = LIPFAST_VECTOR_BYTES == 64 ? 12 : 5;  // rows x 2 accumulators, 2 + 1 operands in registers

// The terms that every entry of a product sums: g[r][left[a]] times row right[a] of the panel.
struct Terms {
  const int32_t *left, *right;
  int64_t count;
};

template <class T>
constexpr int64_t kColumns = 2 * Simd<T>::kLanes;
template <class T>
LIPFAST_INLINE int64_t panel_width(int64_t columns_left) {
  return columns_left > Simd<T>::kLanes ? kColumns<T> : Simd<T>::kLanes;
}
template <class T>
LIPFAST_INLINE int64_t packed_size(int64_t rows, int64_t cols) {
  return rows * round_up(cols, Simd<T>::kLanes);
}
// The panel that starts at column `col`, a multiple of kColumns, in a packed matrix of `rows` rows.
template <class T>
LIPFAST_INLINE const T* panel_at(const T* packed, int64_t rows, int64_t col) {
  return packed + rows * col;
}

// Rows [0, n) of a panel whose columns lie one after another in memory, `col_step` apart, in whole vectors: returns n.
template <class T>
LIPFAST_INLINE int64_t pack_transposed(const T* w, int64_t rows, int64_t cols, int64_t col_step, T* to, int64_t width) {
  constexpr int kLanes = Simd<T>::kLanes;
  if (cols % kLanes != 0) return 0;
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    for (int64_t k = 0; k < cols; k += kLanes) {
      typename Simd<T>::Vector block[kLanes];
      LIPFAST_UNROLL
      for (int q = 0; q < kLanes; ++q) block[q] = load(w + (k + q) * col_step + i);
      transpose<T>(block);
      LIPFAST_UNROLL
      for (int q = 0; q < kLanes; ++q) store(to + (i + q) * width + k, block[q]);
    }
  }
  return i;
}

// Writes a block of rows x cols entries, w[i * row_step + j * col_step], to (row0, col0) of a packed matrix.
template <class T>
void pack_block(const T* w, int64_t rows, int64_t cols, int64_t row_step, int64_t col_step, T* packed, int64_t all_rows,
                int64_t all_cols, int64_t row0, int64_t col0) {
  for (int64_t j = 0; j < cols;) {
    const int64_t panel = (col0 + j) / kColumns<T> * kColumns<T>, width = panel_width<T>(all_cols - panel);
    const int64_t count = smaller(cols - j, panel + width - col0 - j);
    T* to = packed + all_rows * panel + row0 * width + (col0 + j - panel);
    const T* from = w + j * col_step;
    const int64_t done = row_step == 1 ? pack_transposed(from, rows, count, col_step, to, width) : 0;
    to += done * width;
    from += done * row_step;
    for (int64_t i = done; i < rows; ++i, to += width, from += row_step) {
      for (int64_t k = 0; k < count; ++k) to[k] = from[k * col_step];
    }
    j += count;
  }
}

// out[r][0 .. kVectors * kLanes) = sum over the terms, for kRows rows: the inner kernel.
template <class T, int kRows, int kVectors>
void rows_times_panel(const T* g, int64_t g_stride, const Terms& terms, const T* panel, T* out, int64_t out_stride) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  Vector sum[kRows][kVectors] = {};
  const int32_t *lefts = terms.left, *rights = terms.right;
  for (int64_t a = 0; a < terms.count; ++a) {
    const T* left = g + lefts[a];
    const T* right = panel + static_cast<int64_t>(rights[a]) * (kVectors * kLanes);
    Vector w[kVectors];
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load(right + v * kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector factor = splat(left[r * g_stride]);
      LIPFAST_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * w[v];
    }
  }
  store_tile(out, out_stride, sum);
}

// The same for any number of rows, in tiles of equal height. Writes whole panels: up to kColumns - 1 columns more than
// the matrix has.
template <class T>
void all_rows_times_panel(const T* g, int64_t rows, int64_t g_stride, const Terms& terms, const T* panel, int64_t width,
                          T* out, int64_t out_stride) {
  for_tiles<kRowTile>(rows, [&]<int kRows>(int64_t r) {
    if (width == kColumns<T>) {
      rows_times_panel<T, kRows, 2>(g + r * g_stride, g_stride, terms, panel, out + r * out_stride, out_stride);
    } else {
      rows_times_panel<T, kRows, 1>(g + r * g_stride, g_stride, terms, panel, out + r * out_stride, out_stride);
    }
  });
}

// The last two panels of a matrix at once where the last one is a single vector: each entry of g is read once for both.
constexpr int kJoinedRowTile = LIPFAST_VECTOR_BYTES == 64 ? 8 : 3;  // rows x 3 accumulators, 3 + 1 operands

template <class T>
LIPFAST_INLINE bool joins_last_panels(int64_t columns_left) {
  return columns_left > kColumns<T> && columns_left <= kColumns<T> + Simd<T>::kLanes;
}
template <class T, int kRows>
void rows_times_joined_panels(const T* g, int64_t g_stride, const Terms& terms, const T* panel, const T* last, T* out,
                              int64_t out_stride) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes;
  Vector sum[kRows][3] = {};
  for (int64_t a = 0; a < terms.count; ++a) {
    const T* left = g + terms.left[a];
    const int64_t right = terms.right[a];
    const Vector w[3] = {load(panel + right * 2 * kLanes), load(panel + right * 2 * kLanes + kLanes),
                         load(last + right * kLanes)};
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vector factor = splat(left[r * g_stride]);
      LIPFAST_UNROLL
      for (int v = 0; v < 3; ++v) sum[r][v] += factor * w[v];
    }
  }
  store_tile(out, out_stride, sum);
}
template <class T>
void all_rows_times_joined_panels(const T* g, int64_t rows, int64_t g_stride, const Terms& terms, const T* panel,
                                  const T* last, T* out, int64_t out_stride) {
  for_tiles<kJoinedRowTile>(rows, [&]<int kRows>(int64_t r) {
    rows_times_joined_panels<T, kRows>(g + r * g_stride, g_stride, terms, panel, last, out + r * out_stride,
                                       out_stride);
  });
}

#endif

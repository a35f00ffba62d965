// Matrices in packed panels, and the step of the sweep: Cholesky's factor of the block of one layer together with the
// rows of the next layer below it.
//
// A panel holds two vectors of rows, column by column: [column][row of the panel]. Rows are padded to whole panels and
// columns to whole tiles, with zeros (ones on a diagonal): exact numbers that change no other.
#ifndef LIPFAST_CHAIN_QUADRATIC_PANELS_INL_H
#define LIPFAST_CHAIN_QUADRATIC_PANELS_INL_H

#include "gram-inl.h"
#include "vector-inl.h"

template <class T>
constexpr int64_t kPanelRows = 2 * Simd<T>::kLanes;
// Columns eliminated together: whole panels and tiles. Of large matrices more, as all threads wait for each other.
LIPFAST_INLINE int64_t columns_together(int64_t columns) { return columns < 1024 ? 64 : 128; }
constexpr int64_t kProductDepth = 128;  // columns of a panel that stay in L1: 16 KiB with AVX-512

template <class T>
LIPFAST_INLINE int64_t padded_rows(int64_t n) {
  return round_up(n, kPanelRows<T>);
}
LIPFAST_INLINE int64_t padded_columns(int64_t n) { return round_up(n, kTileRows); }

template <class T>
struct Panels {
  T* data;
  int64_t rows, columns;                                     // padded
  LIPFAST_INLINE T* at(int64_t row, int64_t column) const {  // row: a panel's first
    return data + row * columns + column * kPanelRows<T>;
  }
  LIPFAST_INLINE T& entry(int64_t row, int64_t column) const {
    return at(row / kPanelRows<T> * kPanelRows<T>, column)[row % kPanelRows<T>];
  }
  LIPFAST_INLINE int64_t size() const { return rows * columns; }
};

template <class T>
using Tile = typename Simd<T>::Vector[kTileRows][2];

// c += a b^T over `depth` columns; a: rows of a panel, b: a whole panel.
template <class T>
LIPFAST_INLINE void add_tile_product(const T* a, const T* b, int64_t depth, Tile<T>& c) {
  for (int64_t k = 0; k < depth; ++k) {
    const typename Simd<T>::Vector b0 = load(b), b1 = load(b + Simd<T>::kLanes);
    LIPFAST_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const typename Simd<T>::Vector factor = splat(a[r]);
      c[r][0] += factor * b0;
      c[r][1] += factor * b1;
    }
    a += kPanelRows<T>;
    b += kPanelRows<T>;
  }
}

// The panel of B at `row` times rows [0, row + panel) of A, transposed, over all columns: of a symmetric A B^T the part
// that counts. Entries are set, or where `subtract` holds, subtracted from what is there.
template <class T>
void panel_product(const Panels<T>& a, const Panels<T>& b, int64_t row, const Panels<T>& out) {
  for (int64_t k0 = 0; k0 < a.columns; k0 += kProductDepth) {
    const int64_t depth = smaller(kProductDepth, a.columns - k0);
    for (int64_t j = 0; j < row + kPanelRows<T>; j += kTileRows) {
      T* to = out.at(row, j);
      Tile<T> c = {};
      if (k0 > 0) load_tile(to, kPanelRows<T>, c);
      add_tile_product(&a.entry(j, k0), b.at(row, k0), depth, c);
      store_tile(to, kPanelRows<T>, c);
    }
  }
}

// out = A B^T where that is symmetric: its lower triangle (and what is right of it in the panels of the diagonal).
template <class T>
void symmetric_product(const Panels<T>& a, const Panels<T>& b, const Panels<T>& out, const Parallel* parallel) {
  const int64_t panels = out.rows / kPanelRows<T>;
  for_items(parallel, panels, [&](int64_t p) { panel_product(a, b, (panels - 1 - p) * kPanelRows<T>, out); });
}

// What the step of one layer factors: [diagonal - K, .; W diag(columns), .], rows and columns of the first scaled by
// `scale` where that is not nullptr.
template <class T>
struct Step {
  Panels<T> k, w;     // n x n, lower triangle; next x n
  const T* diagonal;  // n, padded: of the scaled matrix
  const T* scale;     // n, padded, or nullptr: ones
  const T* columns;   // n, padded
  Panels<T> l, b;     // the factor of the first rows, and below it that of W's
  T* inverse;         // n, padded: reciprocals of L's diagonal
};

// A's columns [c0, c0 + width) in the panel of L at `row`.
template <class T>
void first_entries(const Step<T>& step, int64_t row, int64_t c0, int64_t width) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int64_t kRows = kPanelRows<T>, kLanes = Simd<T>::kLanes;
  const T* from = step.k.at(row, c0);
  T* to = step.l.at(row, c0);
  Vector scale0 = splat(T{1}), scale1 = scale0;
  if (step.scale != nullptr) {
    scale0 = load(step.scale + row);
    scale1 = load(step.scale + row + kLanes);
  }
  for (int64_t k = 0; k < width; ++k) {
    const Vector factor = splat(step.scale != nullptr ? -step.scale[c0 + k] : T{-1});
    store(to + k * kRows, load(from + k * kRows) * scale0 * factor);
    store(to + k * kRows + kLanes, load(from + k * kRows + kLanes) * scale1 * factor);
    const int64_t r = c0 + k - row;
    if (r >= 0 && r < kRows) to[k * kRows + r] += step.diagonal[c0 + k];
  }
}

template <class T>
void first_entries_below(const Step<T>& step, int64_t row, int64_t c0, int64_t width) {
  constexpr int64_t kRows = kPanelRows<T>, kLanes = Simd<T>::kLanes;
  const T* from = step.w.at(row, c0);
  T* to = step.b.at(row, c0);
  for (int64_t k = 0; k < width; ++k) {
    const typename Simd<T>::Vector factor = splat(step.columns[c0 + k]);
    store(to + k * kRows, load(from + k * kRows) * factor);
    store(to + k * kRows + kLanes, load(from + k * kRows + kLanes) * factor);
  }
}

// Subtracts the products with the columns before c0.
template <class T>
void subtract_products(const Panels<T>& l, const Panels<T>& m, int64_t row, int64_t c0, int64_t width) {
  for (int64_t k0 = 0; k0 < c0; k0 += kProductDepth) {
    const int64_t depth = smaller(kProductDepth, c0 - k0);
    for (int64_t j = c0; j < c0 + width; j += kTileRows) {
      T* to = m.at(row, j);
      Tile<T> c = {}, before;
      add_tile_product(&l.entry(j, k0), m.at(row, k0), depth, c);
      load_tile(to, kPanelRows<T>, before);
      LIPFAST_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        before[r][0] -= c[r][0];
        before[r][1] -= c[r][1];
      }
      store_tile(to, kPanelRows<T>, before);
    }
  }
}

// A tile's columns: less the products with those of the block before it.
template <class T>
LIPFAST_INLINE void within_block(const Panels<T>& l, const Panels<T>& m, int64_t row, int64_t c0, int64_t j,
                                 Tile<T>& c) {
  Tile<T> sum = {};
  add_tile_product(&l.entry(j, c0), m.at(row, c0), j - c0, sum);
  load_tile(m.at(row, j), kPanelRows<T>, c);
  LIPFAST_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    c[r][0] -= sum[r][0];
    c[r][1] -= sum[r][1];
  }
}

// ... and divided by the tile's triangle, whose entries are read from L.
template <class T>
LIPFAST_INLINE void divide_by_triangle(const Panels<T>& l, const T* inverse, int64_t j, Tile<T>& c) {
  const T* triangle = &l.entry(j, j);
  LIPFAST_UNROLL
  for (int q = 0; q < kTileRows; ++q) {
    LIPFAST_UNROLL
    for (int p = 0; p < q; ++p) {
      const typename Simd<T>::Vector factor = splat(triangle[p * kPanelRows<T> + q]);
      c[q][0] -= c[p][0] * factor;
      c[q][1] -= c[p][1] * factor;
    }
    const typename Simd<T>::Vector factor = splat(inverse[j + q]);
    c[q][0] *= factor;
    c[q][1] *= factor;
  }
}

template <class T>
void solve_block(const Step<T>& step, const Panels<T>& m, int64_t row, int64_t c0, int64_t width) {
  for (int64_t j = c0; j < c0 + width; j += kTileRows) {
    Tile<T> c;
    within_block(step.l, m, row, c0, j, c);
    divide_by_triangle(step.l, step.inverse, j, c);
    store_tile(m.at(row, j), kPanelRows<T>, c);
  }
}

// The triangle of a tile, in place; reciprocals of its diagonal to `inverse`. False: a pivot is not positive or not
// finite.
template <class T>
bool factor_triangle(T* a, T* inverse) {
  constexpr int64_t kRows = kPanelRows<T>;
  for (int64_t q = 0; q < kTileRows; ++q) {
    T* column = a + q * kRows;
    if (!(column[q] > 0) || !(column[q] < static_cast<T>(INFINITY))) return false;
    const T pivot = static_cast<T>(sqrt(column[q]));
    column[q] = pivot;
    inverse[q] = 1 / pivot;
    if (!(inverse[q] > 0) || !(inverse[q] < static_cast<T>(INFINITY))) return false;
    for (int64_t r = q + 1; r < kTileRows; ++r) column[r] *= inverse[q];
    for (int64_t p = q + 1; p < kTileRows; ++p) {
      for (int64_t r = p; r < kTileRows; ++r) a[p * kRows + r] -= column[r] * column[p];
    }
  }
  return true;
}

// The block on the diagonal, whose entries are less the products with the columns before it.
template <class T>
bool factor_diagonal_block(const Step<T>& step, int64_t c0, int64_t width) {
  constexpr int64_t kRows = kPanelRows<T>;
  const int64_t end = smaller(round_up(c0 + width, kRows), step.l.rows);
  for (int64_t j = c0; j < c0 + width; j += kTileRows) {
    const int64_t own = j / kRows * kRows;
    for (int64_t row = own; row < end; row += kRows) {
      Tile<T> c;
      within_block(step.l, step.l, row, c0, j, c);
      T* to = step.l.at(row, j);
      T triangle[kTileRows][kTileRows];
      if (row == own) {
        store_tile(to, kRows, c);
        if (!factor_triangle(to + j - own, step.inverse + j)) return false;
        for (int q = 0; q < kTileRows; ++q) {
          for (int r = 0; r < kTileRows; ++r) triangle[q][r] = r < q ? 0 : to[q * kRows + j - own + r];
        }
      }
      divide_by_triangle(step.l, step.inverse, j, c);
      store_tile(to, kRows, c);
      if (row > own) continue;
      for (int q = 0; q < kTileRows; ++q) {  // the triangle as others were divided by it, zeros above it
        for (int64_t r = 0; r < j - own; ++r) to[q * kRows + r] = 0;
        for (int r = 0; r < kTileRows; ++r) to[q * kRows + j - own + r] = triangle[q][r];
      }
    }
  }
  return true;
}

// Every entry of L and B is (a_jk - a sum of products in some order) times the reciprocal of a pivot, one rounding per
// operation or fewer: two where the classical analysis has a quotient. False when the block is not positive definite
// in floating point; NaN is not.
template <class T>
bool factor_step(const Step<T>& step, const Parallel* parallel) {
  constexpr int64_t kRows = kPanelRows<T>;
  const int64_t most = columns_together(step.l.columns);
  for (int64_t c0 = 0; c0 < step.l.columns; c0 += most) {
    const int64_t width = smaller(most, step.l.columns - c0);
    const int64_t below = smaller(round_up(c0 + width, kRows), step.l.rows);
    for (int64_t row = c0; row < below; row += kRows) {
      const int64_t own = smaller(width, row + kRows - c0);  // no columns right of its rows
      first_entries(step, row, c0, own);
      subtract_products(step.l, step.l, row, c0, own);
    }
    if (!factor_diagonal_block(step, c0, width)) return false;
    const int64_t own = (step.l.rows - below) / kRows;
    for_items(parallel, own + step.b.rows / kRows, [&](int64_t p) {
      const bool next = p >= own;
      const Panels<T>& m = next ? step.b : step.l;
      const int64_t row = next ? (p - own) * kRows : below + p * kRows;
      if (next) {
        first_entries_below(step, row, c0, width);
      } else {
        first_entries(step, row, c0, width);
      }
      subtract_products(step.l, m, row, c0, width);
      solve_block(step, m, row, c0, width);
    });
  }
  return true;
}

// Columns k .. of a panel matrix, transposed, times rows [first, end) of x, which has `width` numbers a row: vector v
// of the products is added to sum.
template <class T>
LIPFAST_INLINE void add_transposed(const Panels<T>& m, int64_t k, int64_t first, int64_t end, const T* x, int64_t width,
                                   typename Simd<T>::Vector (&sum)[kTileRows]) {
  constexpr int64_t kRows = kPanelRows<T>;
  for (int64_t row = first; row < end;) {
    const int64_t panel = row / kRows * kRows, stop = smaller(end, panel + kRows);
    const T* from = m.at(panel, k) - panel;
    for (; row < stop; ++row) {
      const typename Simd<T>::Vector value = load(x + row * width);
      LIPFAST_UNROLL
      for (int r = 0; r < kTileRows; ++r) sum[r] += splat(from[row + r * kRows]) * value;
    }
  }
}

// out = M^T x for all columns.
template <class T>
void transposed_product(const Panels<T>& m, int64_t rows, const T* x, int64_t width, T* out, const Parallel* parallel) {
  for_items(parallel, m.columns / kTileRows, [&](int64_t tile) {
    for (int64_t v = 0; v < width; v += Simd<T>::kLanes) {
      typename Simd<T>::Vector sum[kTileRows] = {};
      add_transposed(m, tile * kTileRows, 0, rows, x + v, width, sum);
      for (int r = 0; r < kTileRows; ++r) store(out + (tile * kTileRows + r) * width + v, sum[r]);
    }
  });
}

// x = L^-T x
template <class T>
void solve_transposed(const Panels<T>& l, const T* inverse, int64_t rows, T* x, int64_t width) {
  for (int64_t k = l.columns - kTileRows; k >= 0; k -= kTileRows) {
    const T* triangle = &l.entry(k, k);
    for (int64_t v = 0; v < width; v += Simd<T>::kLanes) {
      typename Simd<T>::Vector sum[kTileRows] = {}, y[kTileRows];
      add_transposed(l, k, k + kTileRows, larger(rows, k + kTileRows), x + v, width, sum);
      LIPFAST_UNROLL
      for (int q = kTileRows - 1; q >= 0; --q) {
        y[q] = load(x + (k + q) * width + v) - sum[q];
        LIPFAST_UNROLL
        for (int p = q + 1; p < kTileRows; ++p) y[q] -= y[p] * splat(triangle[q * kPanelRows<T> + p]);
        y[q] *= splat(inverse[k + q]);
        store(x + (k + q) * width + v, y[q]);
      }
    }
  }
}

// z = K v from the lower triangle; v, z: padded to K's rows, v with zeros.
template <class T>
void multiply_lower(const Panels<T>& k, const T* v, T* z) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int64_t kRows = kPanelRows<T>, kLanes = Simd<T>::kLanes;
  for (int64_t row = 0; row < k.rows; row += kRows) {
    const Vector x0 = load(v + row), x1 = load(v + row + kLanes);
    Vector y0{}, y1{};
    const T* from = k.at(row, 0);
    for (int64_t c = 0; c < row; c += kLanes) {
      Vector across[kLanes];
      LIPFAST_UNROLL
      for (int q = 0; q < kLanes; ++q) {
        const Vector a0 = load(from + (c + q) * kRows), a1 = load(from + (c + q) * kRows + kLanes);
        const Vector factor = splat(v[c + q]);
        y0 += a0 * factor;
        y1 += a1 * factor;
        across[q] = a0 * x0 + a1 * x1;
      }
      store(z + c, load(z + c) + lane_sums<T>(across));
    }
    for (int64_t c = row; c < row + kRows; ++c) {  // the panel's own square is whole
      const Vector factor = splat(v[c]);
      y0 += load(from + c * kRows) * factor;
      y1 += load(from + c * kRows + kLanes) * factor;
    }
    store(z + row, y0);
    store(z + row + kLanes, y1);
  }
}

#endif

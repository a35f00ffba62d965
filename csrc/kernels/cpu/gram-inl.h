// Gram matrix of the smaller side of W, in float64.
//
//   G = B B^T,  B = 2^e W (s x l) when W has at most as many rows as columns, else 2^e W^T.
//
// Only G's upper triangle (with the diagonal) is defined on return; entries below it are scratch. Every entry is a
// sum of l products in some order, each product and each addition rounded at most once:
//   |G - B B^T| <= gamma_l |B| |B|^T  elementwise.
#ifndef LIPFAST_GRAM_INL_H
#define LIPFAST_GRAM_INL_H

#include "vector-inl.h"

constexpr int kTileRows = LIPFAST_VECTOR_BYTES == 64 ? 8 : 4;  // rows of a register tile, as registers allow
constexpr int kPanel = 2 * kDoubles;                           // columns of a register tile; a multiple of kTileRows
constexpr int64_t kGramDepth = 256;  // columns of B per pass: a panel of them (16 KiB with AVX2) stays in L1

// Leading dimension of an s x s matrix with room for whole tiles, and the doubles that it takes.
LIPFAST_INLINE int64_t leading_dimension(int64_t s) { return round_up(s, 16); }
LIPFAST_INLINE int64_t square_size(int64_t s) { return leading_dimension(s) * leading_dimension(s); }

// c += a b^T for one tile; a and b are packed panels [depth][kPanel].
LIPFAST_INLINE void multiply_tile(const double* a, const double* b, int64_t depth, DoubleVector (&c)[kTileRows][2]) {
  for (int64_t k = 0; k < depth; ++k) {
    const DoubleVector b0 = load(b), b1 = load(b + kDoubles);
    LIPFAST_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const DoubleVector ar = splat(a[r]);
      c[r][0] += ar * b0;
      c[r][1] += ar * b1;
    }
    a += kPanel;
    b += kPanel;
  }
}

// kDoubles rows of `depth` entries, `stride` apart, as columns [k][0 .. kDoubles) of a panel.
template <class T>
LIPFAST_INLINE void pack_columns(const T* w, int64_t stride, PowerOfTwo scaling, int64_t depth, double* panel) {
  int64_t k = 0;
  for (; k + kDoubles <= depth; k += kDoubles) {
    DoubleVector block[kDoubles];
    LIPFAST_UNROLL
    for (int j = 0; j < kDoubles; ++j) {
      block[j] = load_double(w + j * stride + k) * splat(scaling.first) * splat(scaling.second);
    }
    transpose<double>(block);
    LIPFAST_UNROLL
    for (int i = 0; i < kDoubles; ++i) store(panel + (k + i) * kPanel, block[i]);
  }
  for (; k < depth; ++k) {
    for (int j = 0; j < kDoubles; ++j) panel[k * kPanel + j] = scaling(w[j * stride + k]);
  }
}

// Panel p of columns [k0, k0 + depth) of B: B[p kPanel + j][k0 + k] at [k][j], zero outside.
template <class T>
void pack_panel(const T* w, int64_t rows, int64_t cols, PowerOfTwo scaling, int64_t k0, int64_t depth, int64_t p,
                double* panel) {
  const bool wide = rows <= cols;
  const int64_t s = wide ? rows : cols;
  const int64_t count = smaller<int64_t>(kPanel, s - p * kPanel);
  if (count < kPanel) memset(panel, 0, sizeof(double) * depth * kPanel);
  if (wide) {
    const T* first = w + p * kPanel * cols + k0;
    int64_t j = 0;
    for (; j + kDoubles <= count; j += kDoubles) pack_columns(first + j * cols, cols, scaling, depth, panel + j);
    for (; j < count; ++j) {
      for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + j] = scaling(first[j * cols + k]);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = w + (k0 + k) * cols + p * kPanel;
      for (int64_t j = 0; j < count; ++j) panel[k * kPanel + j] = scaling(row[j]);
    }
  }
}

inline int64_t gram_panels_size(int64_t s) { return round_up(s, kPanel) * kGramDepth; }

// Rows of G that are computed together: their panels (256 KiB) stay in L2 while all columns pass by.
constexpr int64_t kGramRows = 128;

// Rows [i0, i0 + kGramRows) of G, right of the diagonal: add (or set) the products of `depth` columns.
inline void gram_rows(double* g, int64_t s, int64_t i0, const double* panels, int64_t depth, bool add) {
  const int64_t ld = leading_dimension(s), end = smaller(s, i0 + kGramRows);
  for (int64_t j = i0 / kPanel * kPanel; j < s; j += kPanel) {
    const double* b = panels + j * depth;
    for (int64_t i = i0; i < smaller(end, j + kPanel); i += kTileRows) {
      DoubleVector c[kTileRows][2] = {};
      multiply_tile(panels + i / kPanel * kPanel * depth + i % kPanel, b, depth, c);
      LIPFAST_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        double* out = g + (i + r) * ld + j;
        store(out, add ? load(out) + c[r][0] : c[r][0]);
        store(out + kDoubles, add ? load(out + kDoubles) + c[r][1] : c[r][1]);
      }
    }
  }
}

// g: square_size(s) doubles; panels: gram_panels_size(s) doubles.
template <class T>
void gram(const T* w, int64_t rows, int64_t cols, PowerOfTwo scaling, double* g, double* panels,
          const Parallel* parallel) {
  const int64_t s = smaller(rows, cols), l = larger(rows, cols);
  for (int64_t k0 = 0; k0 < l; k0 += kGramDepth) {
    const int64_t depth = smaller(kGramDepth, l - k0);
    for_items(parallel, (s + kPanel - 1) / kPanel,
              [&](int64_t p) { pack_panel(w, rows, cols, scaling, k0, depth, p, panels + p * kPanel * depth); });
    for_items(parallel, (s + kGramRows - 1) / kGramRows,
              [&](int64_t block) { gram_rows(g, s, block * kGramRows, panels, depth, k0 > 0); });
  }
}

// z = G v from the upper triangle: each entry is read once and used twice.
inline void multiply_symmetric(const double* g, int64_t s, const double* v, double* z) {
  const int64_t ld = leading_dimension(s);
  for (int64_t i = 0; i < s; ++i) z[i] = 0;
  int64_t i = 0;
  for (; i + kTileRows <= s; i += kTileRows) {
    const double* row[kTileRows];
    DoubleVector factor[kTileRows], sum[kTileRows] = {};
    double tail[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      row[r] = g + (i + r) * ld;
      factor[r] = splat(v[i + r]);
      tail[r] = row[r][i + r] * v[i + r];
      for (int q = r + 1; q < kTileRows; ++q) {
        tail[r] += row[r][i + q] * v[i + q];
        z[i + q] += row[r][i + q] * v[i + r];
      }
    }
    int64_t j = i + kTileRows;
    for (; j + kDoubles <= s; j += kDoubles) {
      const DoubleVector vj = load(v + j);
      DoubleVector zj = load(z + j);
      LIPFAST_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        const DoubleVector entry = load(row[r] + j);
        sum[r] += entry * vj;
        zj += factor[r] * entry;
      }
      store(z + j, zj);
    }
    for (; j < s; ++j) {
      for (int r = 0; r < kTileRows; ++r) {
        tail[r] += row[r][j] * v[j];
        z[j] += row[r][j] * v[i + r];
      }
    }
    for (int r = 0; r < kTileRows; ++r) z[i + r] += tail[r] + horizontal_sum<double>(sum[r]);
  }
  for (; i < s; ++i) {
    const double* row = g + i * ld;
    double sum = row[i] * v[i];
    for (int64_t j = i + 1; j < s; ++j) {
      sum += row[j] * v[j];
      z[j] += row[j] * v[i];
    }
    z[i] += sum;
  }
}

#endif

// Cholesky factorisation A = L L^T of A = t I - G, blocked, in float64: the certificate of spectral_norms.
//
// G lies in the upper triangle (with the diagonal) and stays; L's strict lower triangle is written below it and L's
// diagonal into an array of its own. Every entry of L is (a_ij - sum of products in some order) / l_jj with one
// rounding per operation or fewer, never through an inverted block, so that the classical backward error holds:
//   A + E = L L^T,  |E| <= gamma_{s+2} |L| |L|^T   (Demmel 1989; Higham 2002, theorem 10.3).
#ifndef LIPFAST_CHOLESKY_INL_H
#define LIPFAST_CHOLESKY_INL_H

#include "gram-inl.h"

constexpr int64_t kBlock = 64;  // columns eliminated together; a multiple of kTileRows

inline int64_t cholesky_panels_size(int64_t s) { return (round_up(s, kPanel) + kBlock) * kBlock; }

// u: kBlock x kBlock, upper triangle of a symmetric block of n columns, replaced by its factor U (U^T U); rows and
// columns beyond n become those of the identity. False when a pivot is not positive.
inline bool factor_block(double* u, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    double* row = u + j * kBlock;
    if (!(row[j] > 0) || !(row[j] < INFINITY)) return false;
    const double pivot = sqrt(row[j]);
    row[j] = pivot;
    for (int64_t k = j + 1; k < n; ++k) row[k] /= pivot;
    for (int64_t i = j + 1; i < n; ++i) axpy(-row[i], row + i, u + i * kBlock + i, n - i);
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t k = larger(i, n); k < kBlock; ++k) u[i * kBlock + k] = i == k ? 1.0 : 0.0;
  }
  return true;
}

// x: a packed panel [kBlock][kPanel] of rows of A, replaced by the same rows of L: x U = a.
inline void solve_panel(const double* u, int64_t n, double* x) {
  for (int64_t j = 0; j < n; j += kTileRows) {
    DoubleVector c[kTileRows][2];
    load_tile(x + j * kPanel, kPanel, c);
    for (int64_t k = 0; k < j; ++k) {
      const DoubleVector x0 = load(x + k * kPanel), x1 = load(x + k * kPanel + kDoubles);
      LIPFAST_UNROLL
      for (int q = 0; q < kTileRows; ++q) {
        const DoubleVector factor = splat(u[k * kBlock + j + q]);
        c[q][0] -= x0 * factor;
        c[q][1] -= x1 * factor;
      }
    }
    LIPFAST_UNROLL
    for (int q = 0; q < kTileRows; ++q) {
      LIPFAST_UNROLL
      for (int p = 0; p < q; ++p) {
        const DoubleVector factor = splat(u[(j + p) * kBlock + j + q]);
        c[q][0] -= c[p][0] * factor;
        c[q][1] -= c[p][1] * factor;
      }
      const DoubleVector pivot = splat(u[(j + q) * kBlock + j + q]);
      c[q][0] /= pivot;
      c[q][1] /= pivot;
      store(x + (j + q) * kPanel, c[q][0]);
      store(x + (j + q) * kPanel + kDoubles, c[q][1]);
    }
  }
}

// Rows [i0, i0 + kPanel) and columns [c0, c0 + n) of the lower triangle to a panel, or back.
inline void pack_rows(const double* a, int64_t ld, int64_t s, int64_t i0, int64_t c0, int64_t n, double* x) {
  memset(x, 0, sizeof(double) * kBlock * kPanel);
  for (int64_t i = i0; i < smaller(s, i0 + kPanel); ++i) {
    for (int64_t k = 0; k < n; ++k) x[k * kPanel + i - i0] = a[i * ld + c0 + k];
  }
}
inline void unpack_rows(const double* x, double* a, int64_t ld, int64_t s, int64_t i0, int64_t c0, int64_t n) {
  for (int64_t i = i0; i < smaller(s, i0 + kPanel); ++i) {
    for (int64_t k = 0; k < n; ++k) a[i * ld + c0 + k] = x[k * kPanel + i - i0];
  }
}

// Rows [i0, i0 + kTrailingRows) of the trailing part [first, s): subtract the products of the panels just solved,
// below the diagonal and on it.
constexpr int64_t kTrailingRows = 128;
inline void update_trailing(double* a, int64_t ld, int64_t s, int64_t first, int64_t i0, const double* panels,
                            double* diagonal) {
  const int64_t end = smaller(s, i0 + kTrailingRows);
  for (int64_t j = first; j < end; j += kPanel) {
    const double* b = panels + (j - first) * kBlock;
    for (int64_t i = larger(i0, j); i < end; i += kTileRows) {
      DoubleVector c[kTileRows][2] = {};
      const int64_t offset = i - first;
      multiply_tile(panels + offset / kPanel * kPanel * kBlock + offset % kPanel, b, kBlock, c);
      if (i >= j + kPanel && i + kTileRows <= s) {
        LIPFAST_UNROLL
        for (int r = 0; r < kTileRows; ++r) {
          double* out = a + (i + r) * ld + j;
          store(out, load(out) - c[r][0]);
          store(out + kDoubles, load(out + kDoubles) - c[r][1]);
        }
        continue;
      }
      for (int64_t r = 0; r < smaller<int64_t>(kTileRows, s - i); ++r) {
        for (int64_t q = 0; q < kPanel && j + q <= i + r; ++q) {
          const double value = c[r][q / kDoubles][q % kDoubles];
          if (j + q == i + r) {
            diagonal[i + r] -= value;
          } else {
            a[(i + r) * ld + j + q] -= value;
          }
        }
      }
    }
  }
}

// The lower triangle of rows [i0, i0 + 16): -G.
inline void negate_rows(double* a, int64_t ld, int64_t s, int64_t i0) {
  for (int64_t j0 = 0; j0 <= i0; j0 += 16) {  // in blocks, for the cache's sake
    for (int64_t i = i0; i < smaller(s, i0 + 16); ++i) {
      for (int64_t j = j0; j < smaller(i, j0 + 16); ++j) a[i * ld + j] = -a[j * ld + i];
    }
  }
}

// a: G above and on the diagonal; on success L strictly below it. diagonal: A's on entry, L's on success.
// panels: cholesky_panels_size(s) doubles. False when A is not positive definite in floating point.
inline bool cholesky(double* a, int64_t s, double* diagonal, double* panels, const Parallel* parallel) {
  const int64_t ld = leading_dimension(s);
  for_items(parallel, (s + 15) / 16, [&](int64_t block) { negate_rows(a, ld, s, block * 16); });
  double* u = panels;
  panels += kBlock * kBlock;
  for (int64_t c0 = 0; c0 < s; c0 += kBlock) {
    const int64_t n = smaller(kBlock, s - c0);
    for (int64_t i = 0; i < n; ++i) {
      u[i * kBlock + i] = diagonal[c0 + i];
      for (int64_t k = i + 1; k < n; ++k) u[i * kBlock + k] = a[(c0 + k) * ld + c0 + i];
    }
    if (!factor_block(u, n)) return false;
    for (int64_t i = 0; i < n; ++i) {
      diagonal[c0 + i] = u[i * kBlock + i];
      for (int64_t k = 0; k < i; ++k) a[(c0 + i) * ld + c0 + k] = u[k * kBlock + i];
    }
    const int64_t first = c0 + n;
    for_items(parallel, (s - first + kPanel - 1) / kPanel, [&](int64_t p) {
      double* x = panels + p * kPanel * kBlock;
      pack_rows(a, ld, s, first + p * kPanel, c0, n, x);
      solve_panel(u, n, x);
      unpack_rows(x, a, ld, s, first + p * kPanel, c0, n);
    });
    const int64_t blocks = (s - first + kTrailingRows - 1) / kTrailingRows;
    for_items(parallel, blocks, [&](int64_t item) {  // the longest rows first
      update_trailing(a, ld, s, first, first + (blocks - 1 - item) * kTrailingRows, panels, diagonal);
    });
  }
  for (int64_t i = 0; i < s; ++i) {
    if (!(diagonal[i] > 0) || !(diagonal[i] < INFINITY)) return false;
  }
  return true;
}

// x = (L L^T)^-1 x
inline void solve(const double* a, int64_t s, const double* diagonal, double* x) {
  const int64_t ld = leading_dimension(s);
  for (int64_t i = 0; i < s; ++i) x[i] = (x[i] - dot(a + i * ld, x, i)) / diagonal[i];
  for (int64_t i = s - 1; i >= 0; --i) {
    x[i] /= diagonal[i];
    axpy(-x[i], a + i * ld, x, i);
  }
}

#endif

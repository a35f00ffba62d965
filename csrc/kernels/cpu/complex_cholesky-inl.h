// Cholesky factorisation A = L L^* of Hermitian matrices in float64: the certificate of conv_norms. Two forms, for
// small matrices one per vector lane, for larger ones blocked. L itself is not kept: only whether it exists.
//
// Every entry of L is (a_ij - sum of products in some order) fl(1 / l_jj), the sum's real and imaginary parts each a
// sum of real products, never through an inverted block, so that the classical backward error holds with three more
// roundings (Higham 2002, theorem 10.3 and section 3.6):
//   A + E = L L^*,  |E| <= sqrt(2) gamma_{2n+8} |L| |L|^*.
#ifndef LIPFAST_COMPLEX_CHOLESKY_INL_H
#define LIPFAST_COMPLEX_CHOLESKY_INL_H

#include "hermitian-inl.h"

// a: lanes_size(n) doubles, as from evaluate_lanes. Bit l of the result: lane l's matrix is positive definite in
// floating point. What is not positive becomes NaN in its lane and stays there.
inline uint32_t cholesky_lanes(double* a, int64_t n) {
  constexpr int kTile = kLaneTile;
  const int64_t padded = round_up(n, kTile);
  int64_t good[kDoubles];
  for (int lane = 0; lane < kDoubles; ++lane) good[lane] = 1;
  for (int64_t j = 0; j < padded; j += kTile) {
    DoubleVector inverse[kTile] = {};
    for (int64_t i = j; i < padded; i += kTile) {
      DoubleVector real[kTile][kTile], imaginary[kTile][kTile];
      double *rows[kTile], *columns[kTile];
      LIPFAST_UNROLL
      for (int r = 0; r < kTile; ++r) {
        rows[r] = a + lane_row(i + r) * 2 * kDoubles;
        columns[r] = a + lane_row(j + r) * 2 * kDoubles;
        LIPFAST_UNROLL
        for (int c = 0; c < kTile; ++c) {
          real[r][c] = load(rows[r] + 2 * (j + c) * kDoubles);
          imaginary[r][c] = load(rows[r] + (2 * (j + c) + 1) * kDoubles);
        }
      }
      for (int64_t k = 0; k < 2 * j * kDoubles; k += 2 * kDoubles) {
        DoubleVector br[kTile], bi[kTile];
        LIPFAST_UNROLL
        for (int c = 0; c < kTile; ++c) {
          br[c] = load(columns[c] + k);
          bi[c] = load(columns[c] + k + kDoubles);
        }
        LIPFAST_UNROLL
        for (int r = 0; r < kTile; ++r) {
          const DoubleVector ar = load(rows[r] + k), ai = load(rows[r] + k + kDoubles);
          LIPFAST_UNROLL
          for (int c = 0; c < kTile; ++c) {
            real[r][c] -= ar * br[c];
            real[r][c] -= ai * bi[c];
            imaginary[r][c] -= ai * br[c];
            imaginary[r][c] += ar * bi[c];
          }
        }
      }
      LIPFAST_UNROLL
      for (int c = 0; c < kTile; ++c) {
        LIPFAST_UNROLL
        for (int p = 0; p < c; ++p) {
          const DoubleVector br = load(columns[c] + 2 * (j + p) * kDoubles);
          const DoubleVector bi = load(columns[c] + (2 * (j + p) + 1) * kDoubles);
          LIPFAST_UNROLL
          for (int r = 0; r < kTile; ++r) {
            real[r][c] -= real[r][p] * br + imaginary[r][p] * bi;
            imaginary[r][c] -= imaginary[r][p] * br - real[r][p] * bi;
          }
        }
        if (i == j) {
          // The tile on the diagonal: entry (c, c) is complete, and real up to rounding.
          for (int lane = 0; lane < kDoubles; ++lane) {
            good[lane] &= real[c][c][lane] > 0 && real[c][c][lane] < INFINITY;
          }
          inverse[c] = 1.0 / square_root(real[c][c]);
          real[c][c] = square_root(real[c][c]);
          imaginary[c][c] = DoubleVector{};
          LIPFAST_UNROLL
          for (int r = 0; r < kTile; ++r) {
            if (r <= c) continue;
            real[r][c] *= inverse[c];
            imaginary[r][c] *= inverse[c];
          }
          LIPFAST_UNROLL
          for (int r = 0; r < kTile; ++r) {
            if (r < c) continue;
            store(rows[r] + 2 * (j + c) * kDoubles, real[r][c]);
            store(rows[r] + (2 * (j + c) + 1) * kDoubles, imaginary[r][c]);
          }
          continue;
        }
        LIPFAST_UNROLL
        for (int r = 0; r < kTile; ++r) {
          real[r][c] *= inverse[c];
          imaginary[r][c] *= inverse[c];
          store(rows[r] + 2 * (j + c) * kDoubles, real[r][c]);
          store(rows[r] + (2 * (j + c) + 1) * kDoubles, imaginary[r][c]);
        }
      }
    }
  }
  uint32_t mask = 0;
  for (int lane = 0; lane < kDoubles; ++lane) mask |= good[lane] ? 1u << lane : 0u;
  return mask;
}

constexpr int64_t kComplexBlock = 64;  // columns eliminated together; a multiple of kComplexPanel
constexpr int64_t kComplexPanelSize = kComplexBlock * 2 * kComplexPanel;

inline int64_t complex_cholesky_size(int64_t n) {
  return 2 * kComplexBlock * kComplexBlock + kComplexBlock + round_up(n, kComplexPanel) * kComplexBlock * 2;
}

// u: two kComplexBlock squares, real and imaginary, whose upper triangle holds a Hermitian block of n columns; replaced
// by U, U^* U = block. inverse: 1 / u_jj.
inline bool factor_complex_block(double* u, double* inverse, int64_t n) {
  constexpr int64_t ld = kComplexBlock;
  double *real = u, *imaginary = u + ld * ld;
  for (int64_t j = 0; j < n; ++j) {
    double *pr = real + j * ld, *pi = imaginary + j * ld;
    if (!(pr[j] > 0) || !(pr[j] < INFINITY)) return false;
    inverse[j] = 1 / sqrt(pr[j]);
    for (int64_t k = j + 1; k < n; ++k) {
      pr[k] *= inverse[j];
      pi[k] *= inverse[j];
    }
    for (int64_t i = j + 1; i < n; ++i) {
      double *qr = real + i * ld, *qi = imaginary + i * ld;
      const double fr = pr[i], fi = pi[i];
      for (int64_t k = i; k < n; ++k) {
        qr[k] -= fr * pr[k] + fi * pi[k];
        qi[k] -= fr * pi[k] - fi * pr[k];
      }
    }
  }
  return true;
}

// x: a packed panel of kComplexPanel rows of A, [column][real, imaginary][row], replaced by those of L: x U = a.
inline void solve_complex_panel(const double* u, const double* inverse, double* x) {
  constexpr int kColumns = 4;
  constexpr int64_t ld = kComplexBlock, step = 2 * kComplexPanel;
  for (int64_t j = 0; j < kComplexBlock; j += kColumns) {
    DoubleVector c[kColumns][4];
    load_tile(x + j * step, step, c);
    for (int64_t k = 0; k < j; ++k) {
      const DoubleVector r0 = load(x + k * step), r1 = load(x + k * step + kDoubles);
      const DoubleVector i0 = load(x + k * step + 2 * kDoubles), i1 = load(x + k * step + 3 * kDoubles);
      LIPFAST_UNROLL
      for (int q = 0; q < kColumns; ++q) {
        const DoubleVector fr = splat(u[k * ld + j + q]), fi = splat(u[ld * ld + k * ld + j + q]);
        c[q][0] -= r0 * fr;
        c[q][0] += i0 * fi;
        c[q][1] -= r1 * fr;
        c[q][1] += i1 * fi;
        c[q][2] -= r0 * fi;
        c[q][2] -= i0 * fr;
        c[q][3] -= r1 * fi;
        c[q][3] -= i1 * fr;
      }
    }
    LIPFAST_UNROLL
    for (int q = 0; q < kColumns; ++q) {
      LIPFAST_UNROLL
      for (int p = 0; p < q; ++p) {
        const DoubleVector fr = splat(u[(j + p) * ld + j + q]), fi = splat(u[ld * ld + (j + p) * ld + j + q]);
        c[q][0] -= c[p][0] * fr - c[p][2] * fi;
        c[q][1] -= c[p][1] * fr - c[p][3] * fi;
        c[q][2] -= c[p][0] * fi + c[p][2] * fr;
        c[q][3] -= c[p][1] * fi + c[p][3] * fr;
      }
      const DoubleVector factor = splat(inverse[j + q]);
      LIPFAST_UNROLL
      for (int p = 0; p < 4; ++p) {
        c[q][p] *= factor;
        store(x + (j + q) * step + p * kDoubles, c[q][p]);
      }
    }
  }
}

// c = a b^* for kComplexRows rows of a panel (from row `row` of it) and one panel of columns.
LIPFAST_INLINE void multiply_complex_tile(const double* a, const double* b, DoubleVector (&real)[kComplexRows][2],
                                          DoubleVector (&imaginary)[kComplexRows][2]) {
  for (int64_t k = 0; k < kComplexBlock; ++k) {
    const DoubleVector r0 = load(b), r1 = load(b + kDoubles);
    const DoubleVector i0 = load(b + 2 * kDoubles), i1 = load(b + 3 * kDoubles);
    LIPFAST_UNROLL
    for (int r = 0; r < kComplexRows; ++r) {
      const DoubleVector ar = splat(a[r]), ai = splat(a[r + kComplexPanel]);
      real[r][0] += ar * r0;
      real[r][1] += ar * r1;
      real[r][0] += ai * i0;
      real[r][1] += ai * i1;
      imaginary[r][0] += ai * r0;
      imaginary[r][1] += ai * r1;
      imaginary[r][0] -= ar * i0;
      imaginary[r][1] -= ar * i1;
    }
    a += 2 * kComplexPanel;
    b += 2 * kComplexPanel;
  }
}

// Rows [first, n): subtract the products of the panels just solved, on the diagonal and below it.
inline void update_complex_trailing(double* real, double* imaginary, int64_t n, int64_t first, const double* panels) {
  for (int64_t j = first; j < n; j += kComplexPanel) {
    const double* b = panels + (j - first) / kComplexPanel * kComplexPanelSize;
    for (int64_t i = j; i < n; i += kComplexRows) {
      DoubleVector cr[kComplexRows][2] = {}, ci[kComplexRows][2] = {};
      const int64_t row = i - first;
      multiply_complex_tile(panels + row / kComplexPanel * kComplexPanelSize + row % kComplexPanel, b, cr, ci);
      if (i >= j + kComplexPanel && i + kComplexRows <= n) {
        LIPFAST_UNROLL
        for (int r = 0; r < kComplexRows; ++r) {
          double *out_r = real + packed_row(i + r) + j, *out_i = imaginary + packed_row(i + r) + j;
          store(out_r, load(out_r) - cr[r][0]);
          store(out_r + kDoubles, load(out_r + kDoubles) - cr[r][1]);
          store(out_i, load(out_i) - ci[r][0]);
          store(out_i + kDoubles, load(out_i + kDoubles) - ci[r][1]);
        }
        continue;
      }
      for (int64_t r = 0; r < smaller<int64_t>(kComplexRows, n - i); ++r) {
        for (int64_t q = 0; q < kComplexPanel && j + q <= i + r; ++q) {
          real[packed_row(i + r) + j + q] -= cr[r][q / kDoubles][q % kDoubles];
          imaginary[packed_row(i + r) + j + q] -= ci[r][q / kDoubles][q % kDoubles];
        }
      }
    }
  }
}

// Rows [i0, i0 + kComplexPanel) and columns [c0, c0 + kComplexBlock) to a panel.
inline void pack_complex_rows(const double* real, const double* imaginary, int64_t n, int64_t i0, int64_t c0,
                              double* x) {
  if (i0 + kComplexPanel > n) memset(x, 0, sizeof(double) * kComplexPanelSize);
  for (int64_t r = 0; r < smaller<int64_t>(kComplexPanel, n - i0); ++r) {
    const double *pr = real + packed_row(i0 + r) + c0, *pi = imaginary + packed_row(i0 + r) + c0;
    for (int64_t k = 0; k < kComplexBlock; ++k) {
      x[k * 2 * kComplexPanel + r] = pr[k];
      x[k * 2 * kComplexPanel + kComplexPanel + r] = pi[k];
    }
  }
}

// real, imaginary: packed lower triangle of A, destroyed. work: complex_cholesky_size(n).
inline bool complex_cholesky(double* real, double* imaginary, int64_t n, double* work) {
  constexpr int64_t ld = kComplexBlock;
  double *u = work, *inverse = u + 2 * ld * ld, *panels = inverse + ld;
  for (int64_t c0 = 0; c0 < n; c0 += kComplexBlock) {
    const int64_t count = smaller(kComplexBlock, n - c0);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i <= k; ++i) {
        u[i * ld + k] = real[packed_row(c0 + k) + c0 + i];
        u[ld * ld + i * ld + k] = -imaginary[packed_row(c0 + k) + c0 + i];
      }
    }
    if (!factor_complex_block(u, inverse, count)) return false;
    const int64_t first = c0 + count;
    for (int64_t i = first; i < n; i += kComplexPanel) {
      double* x = panels + (i - first) / kComplexPanel * kComplexPanelSize;
      pack_complex_rows(real, imaginary, n, i, c0, x);
      solve_complex_panel(u, inverse, x);
    }
    update_complex_trailing(real, imaginary, n, first, panels);
  }
  return true;
}

#endif

// The symbol of a convolution with real taps, What(theta) = sum_k W_k e^{i k.theta}, and its Gram matrix
//
//   G(theta) = What(theta) What(theta)^* = R_0 + sum_{j > 0} (e^{i j.theta} R_j + e^{-i j.theta} R_j^T),
//   R_j = sum_k W_{k+j} W_k^T,
//
// j over the lexicographically positive differences of two taps. The R_j are formed once; a Gram matrix then costs
// one pass over them instead of a product. Kept are R_j + R_j^T (even: the real part) and R_j - R_j^T (odd: the
// imaginary part), each packed as hermitian-inl.h says.
#ifndef LIPFAST_COMPLEX_GRAM_INL_H
#define LIPFAST_COMPLEX_GRAM_INL_H

#include "hermitian-inl.h"

constexpr int64_t kTapDepth = 256;                               // columns of two taps that meet in L1
constexpr int kOffsetTile = LIPFAST_VECTOR_BYTES == 64 ? 8 : 4;  // rows of a real register tile

// cos and sin of 2 pi x for x in [0, 1), each within 8 u where x is exact: x is a quarter count plus an exact rest of
// at most an eighth, and Taylor's polynomials of degree 18 and 17 leave less than u / 100.
LIPFAST_INLINE void unit_circle(double x, double* cosine, double* sine) {
  const double quarters = x * 4;
  const int64_t quadrant = static_cast<int64_t>(quarters + 0.5);
  const double y = (quarters - static_cast<double>(quadrant)) * 0x1.921fb54442d18p+0, z = y * y;
  constexpr double kCosine[] = {-1. / 2,       1. / 24,        -1. / 720,         1. / 40320,
                                -1. / 3628800, 1. / 479001600, -1. / 87178291200, 1. / 20922789888000};
  constexpr double kSine[] = {-1. / 6,        1. / 120,        -1. / 5040,          1. / 362880,
                              -1. / 39916800, 1. / 6227020800, -1. / 1307674368000, 1. / 355687428096000};
  double c = -1. / 6402373705728000, s = kSine[7];
  LIPFAST_UNROLL
  for (int i = 7; i >= 0; --i) c = c * z + kCosine[i];
  LIPFAST_UNROLL
  for (int i = 6; i >= 0; --i) s = s * z + kSine[i];
  c = c * z + 1;
  s = s * z * y + y;
  const bool swap = quadrant & 1;
  const double a = swap ? s : c, b = swap ? c : s;
  *cosine = (quadrant + 1) & 2 ? -a : a;
  *sine = quadrant & 2 ? -b : b;
}

// product / q modulo 1, in [0, 1).
LIPFAST_INLINE double cycles_of(int64_t product, int64_t q) {
  int64_t rest = product % q;
  if (rest < 0) rest += q;
  return static_cast<double>(rest) / static_cast<double>(q);
}

// The phase j.theta of an integer offset at the frequency p / q (cycles per axis): integers modulo q, then at most
// three quotients and two sums, so that the angle is off by less than 50 u.
LIPFAST_INLINE void phase(const FrequencyLattice& lattice, const int64_t* p, const int64_t* j, double* cosine,
                          double* sine) {
  double x = 0;
  for (int64_t a = 0; a < lattice.axes; ++a) {
    const int64_t q = lattice.denominators[a];
    // A constant power of two: no division.
    x += q == kCycle ? cycles_of(p[a] * j[a], kCycle) : cycles_of(p[a] * j[a], q);
  }
  x -= static_cast<double>(static_cast<int64_t>(x));
  unit_circle(x, cosine, sine);
}

// out: cosines of all offsets, then sines.
inline void offset_phases(const FrequencyLattice& lattice, const int64_t* offsets, int64_t count, const int64_t* p,
                          double* out) {
  for (int64_t j = 0; j < count; ++j) phase(lattice, p, offsets + 3 * j, out + j, out + count + j);
}

LIPFAST_INLINE int64_t tap_panels_size(const TapShape& shape) {
  return shape.count() * round_up(shape.rows, kComplexPanel) * shape.cols;
}

// Panel q of tap k: W_k[q kComplexPanel + r][c] at [c][r], zero outside.
LIPFAST_INLINE double* tap_panel(const TapShape& shape, double* panels, int64_t k, int64_t q) {
  return panels + (k * round_up(shape.rows, kComplexPanel) + q * kComplexPanel) * shape.cols;
}

template <class T>
void pack_taps(const TapShape& shape, const T* taps, PowerOfTwo scaling, double* panels) {
  const int64_t rows = shape.rows, cols = shape.cols;
  for (int64_t k = 0; k < shape.count(); ++k) {
    for (int64_t q = 0; q * kComplexPanel < rows; ++q) {
      double* panel = tap_panel(shape, panels, k, q);
      const int64_t count = smaller<int64_t>(kComplexPanel, rows - q * kComplexPanel);
      if (count < kComplexPanel) memset(panel, 0, sizeof(double) * cols * kComplexPanel);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = taps + (k * rows + q * kComplexPanel + r) * cols;
        for (int64_t c = 0; c < cols; ++c) panel[c * kComplexPanel + r] = scaling(row[c]);
      }
    }
  }
}

// c += W_a W_b^T for `depth` columns of one tile of rows of a and one panel of rows of b.
LIPFAST_INLINE void multiply_taps(const double* a, const double* b, int64_t depth, double* c, int64_t ld) {
  DoubleVector sum[kOffsetTile][2];
  load_tile(c, ld, sum);
  for (int64_t k = 0; k < depth; ++k) {
    const DoubleVector b0 = load(b), b1 = load(b + kDoubles);
    LIPFAST_UNROLL
    for (int r = 0; r < kOffsetTile; ++r) {
      const DoubleVector ar = splat(a[r]);
      sum[r][0] += ar * b0;
      sum[r][1] += ar * b1;
    }
    a += kComplexPanel;
    b += kComplexPanel;
  }
  store_tile(c, ld, sum);
}

// Scratch of one R_j: a square of whole panels.
LIPFAST_INLINE int64_t offset_square_size(int64_t rows) {
  return round_up(rows, kComplexPanel) * round_up(rows, kComplexPanel);
}

// The pair of taps (k + j, k); false when k + j is none.
LIPFAST_INLINE bool shifted_tap(const TapShape& shape, int64_t k, const int64_t* j, int64_t* shifted) {
  const int64_t* size = shape.sizes;
  const int64_t k2 = k % size[2] + j[2], k1 = k / size[2] % size[1] + j[1], k0 = k / size[2] / size[1] + j[0];
  if (k0 < 0 || k1 < 0 || k2 < 0 || k0 >= size[0] || k1 >= size[1] || k2 >= size[2]) return false;
  *shifted = (k0 * size[1] + k1) * size[2] + k2;
  return true;
}

// R_j's even and odd part, packed, and the trace of the even one. square: offset_square_size(rows) doubles.
inline void autocorrelate(const TapShape& shape, const int64_t* j, double* panels, double* square, double* even,
                          double* odd, double* trace) {
  const int64_t n = shape.rows, cols = shape.cols, ld = round_up(n, kComplexPanel);
  memset(square, 0, sizeof(double) * ld * ld);
  for (int64_t k = 0; k < shape.count(); ++k) {
    int64_t other;
    if (!shifted_tap(shape, k, j, &other)) continue;
    for (int64_t c0 = 0; c0 < cols; c0 += kTapDepth) {
      const int64_t depth = smaller(kTapDepth, cols - c0);
      for (int64_t q = 0; q < ld; q += kComplexPanel) {
        const double* b = tap_panel(shape, panels, k, q / kComplexPanel) + c0 * kComplexPanel;
        for (int64_t i = 0; i < ld; i += kOffsetTile) {
          const double* a = tap_panel(shape, panels, other, i / kComplexPanel) + c0 * kComplexPanel;
          multiply_taps(a + i % kComplexPanel, b, depth, square + i * ld + q, ld);
        }
      }
    }
  }
  const bool diagonal = j[0] == 0 && j[1] == 0 && j[2] == 0;
  memset(even, 0, sizeof(double) * packed_triangle_size(n));
  memset(odd, 0, sizeof(double) * packed_triangle_size(n));
  double sum = 0;
  for (int64_t p = 0; p < n; ++p) {
    double *even_row = even + packed_row(p), *odd_row = odd + packed_row(p);
    for (int64_t q = 0; q <= p; ++q) {
      const double lower = square[p * ld + q], upper = square[q * ld + p];
      even_row[q] = diagonal ? lower : lower + upper;
      odd_row[q] = diagonal ? 0 : lower - upper;
    }
    sum += even_row[p];
  }
  *trace = sum;
}

// Gram matrices of `count` <= kGramBatch frequencies at once, so that one pass over the R_j serves them all.
// phases: one after another as from offset_phases; g: real and imaginary packed triangles, one after another.
constexpr int kGramBatch = 4;

template <int kCount>
LIPFAST_INLINE void evaluate_batch(const double* even, const double* odd, int64_t size, int64_t offsets,
                                   const double* phases, double* g) {
  for (int64_t i = 0; i < size; i += kDoubles) {
    DoubleVector real[kCount], imaginary[kCount];
    const DoubleVector first = load(even + i);
    LIPFAST_UNROLL
    for (int c = 0; c < kCount; ++c) {
      real[c] = first;
      imaginary[c] = DoubleVector{};
    }
    for (int64_t j = 1; j < offsets; ++j) {
      const DoubleVector e = load(even + j * size + i), o = load(odd + j * size + i);
      LIPFAST_UNROLL
      for (int c = 0; c < kCount; ++c) {
        real[c] += splat(phases[c * 2 * offsets + j]) * e;
        imaginary[c] += splat(phases[(c * 2 + 1) * offsets + j]) * o;
      }
    }
    LIPFAST_UNROLL
    for (int c = 0; c < kCount; ++c) {
      store(g + c * 2 * size + i, real[c]);
      store(g + (c * 2 + 1) * size + i, imaginary[c]);
    }
  }
}
inline void evaluate_grams(const double* even, const double* odd, int64_t n, int64_t offsets, const double* phases,
                           int64_t count, double* g) {
  const int64_t size = packed_triangle_size(n);
  if (count == 4) return evaluate_batch<4>(even, odd, size, offsets, phases, g);
  if (count >= 2) {
    evaluate_batch<2>(even, odd, size, offsets, phases, g);
    if (count == 3) evaluate_batch<1>(even, odd, size, offsets, phases + 4 * offsets, g + 4 * size);
    return;
  }
  evaluate_batch<1>(even, odd, size, offsets, phases, g);
}

// a = sign G, lane by lane; the padding is that of the identity. phases: [offset][cosine, sine][lane].
// Returns the squared Frobenius norms.
inline DoubleVector evaluate_lanes(const double* even, const double* odd, int64_t n, int64_t offsets,
                                   const double* phases, double sign, double* a) {
  const int64_t size = packed_triangle_size(n), padded = round_up(n, kLaneTile);
  DoubleVector squares{}, diagonal{};
  for (int64_t p = 0; p < padded; ++p) {
    const double *even_row = even + packed_row(p), *odd_row = odd + packed_row(p);
    double* out = a + lane_row(p) * 2 * kDoubles;
    const int64_t length = round_up(p + 1, kLaneTile);
    if (p >= n) {
      for (int64_t q = 0; q < length; ++q) {
        store(out + 2 * q * kDoubles, splat(p == q ? 1.0 : 0.0));
        store(out + (2 * q + 1) * kDoubles, DoubleVector{});
      }
      continue;
    }
    int64_t q = 0;
    for (; q + 4 <= p + 1; q += 4) {
      DoubleVector real[4], imaginary[4];
      LIPFAST_UNROLL
      for (int r = 0; r < 4; ++r) {
        real[r] = splat(even_row[q + r]);
        imaginary[r] = DoubleVector{};
      }
      for (int64_t j = 1; j < offsets; ++j) {
        const DoubleVector c = load(phases + 2 * j * kDoubles), s = load(phases + (2 * j + 1) * kDoubles);
        LIPFAST_UNROLL
        for (int r = 0; r < 4; ++r) {
          real[r] += splat(even_row[j * size + q + r]) * c;
          imaginary[r] += splat(odd_row[j * size + q + r]) * s;
        }
      }
      LIPFAST_UNROLL
      for (int r = 0; r < 4; ++r) {
        squares += real[r] * real[r] + imaginary[r] * imaginary[r];
        if (q + r == p) diagonal += real[r] * real[r];
        store(out + 2 * (q + r) * kDoubles, sign * real[r]);
        store(out + (2 * (q + r) + 1) * kDoubles, sign * imaginary[r]);
      }
    }
    for (; q < length; ++q) {
      DoubleVector real{}, imaginary{};
      if (q <= p) {
        real = splat(even_row[q]);
        for (int64_t j = 1; j < offsets; ++j) {
          real += splat(even_row[j * size + q]) * load(phases + 2 * j * kDoubles);
          imaginary += splat(odd_row[j * size + q]) * load(phases + (2 * j + 1) * kDoubles);
        }
        squares += real * real + imaginary * imaginary;
        if (q == p) diagonal += real * real;
      }
      store(out + 2 * q * kDoubles, sign * real);
      store(out + (2 * q + 1) * kDoubles, sign * imaginary);
    }
  }
  return squares + squares - diagonal;
}

// z = G x for a packed Hermitian matrix; vectors hold round_up(n, 8) real parts, then as many imaginary ones.
inline void multiply_hermitian(const double* real, const double* imaginary, int64_t n, const double* x, double* z) {
  const int64_t half = round_up(n, 8);
  const double *xr = x, *xi = x + half;
  double *zr = z, *zi = z + half;
  memset(z, 0, sizeof(double) * 2 * half);
  for (int64_t p = 0; p < n; ++p) {
    const double *gr = real + packed_row(p), *gi = imaginary + packed_row(p);
    const DoubleVector ar = splat(xr[p]), ai = splat(xi[p]);
    DoubleVector sr{}, si{};
    for (int64_t q = 0; q <= p; q += kDoubles) {
      const DoubleVector er = load(gr + q), ei = load(gi + q), br = load(xr + q), bi = load(xi + q);
      sr += er * br - ei * bi;
      si += er * bi + ei * br;
      store(zr + q, load(zr + q) + er * ar + ei * ai);
      store(zi + q, load(zi + q) + er * ai - ei * ar);
    }
    // The diagonal entry, which is real, came twice.
    zr[p] += horizontal_sum<double>(sr) - gr[p] * xr[p];
    zi[p] += horizontal_sum<double>(si) - gr[p] * xi[p];
  }
}

#endif

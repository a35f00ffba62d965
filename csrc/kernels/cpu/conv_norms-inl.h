// Kernels of conv_norms, once per instruction set.
#ifndef LIPFAST_CONV_NORMS_INL_H
#define LIPFAST_CONV_NORMS_INL_H

#include "complex_cholesky-inl.h"
#include "complex_gram-inl.h"
#include "lanczos-inl.h"
#include "matrix-inl.h"

template <class T>
const T* taps_of(const ConvProblem& problem, int64_t group) {
  return static_cast<const T*>(problem.taps) + group * problem.shape.count() * problem.shape.rows * problem.shape.cols;
}

// e^{i k.theta} of tap number k.
LIPFAST_INLINE void tap_phase(const ConvProblem& problem, const int64_t* p, int64_t k, double* cosine, double* sine) {
  const int64_t* size = problem.shape.sizes;
  const int64_t tap[3] = {k / size[2] / size[1], k / size[2] % size[1], k % size[2]};
  phase(problem.lattice, p, tap, cosine, sine);
}

// Up to this side one matrix per vector lane: kDoubles of them stay in L2.
constexpr int64_t kLaneSide = 72;

template <class T>
bool conv_examine(const ConvProblem& problem, int* exponent, double* largest) {
  const int64_t rows = problem.groups * problem.shape.count() * problem.shape.rows;
  Matrix<T> w{};
  const bool finite = examine(taps_of<T>(problem, 0), rows, problem.shape.cols, problem.parallel, w);
  *exponent = w.exponent;
  *largest = w.largest;
  return finite;
}

// out: ||P||_F^2, ||P||_1 and ||P||_inf of P = sum_k |W_k| of one group, scaled. work: 2 cols doubles.
template <class T>
void conv_magnitudes(const ConvProblem& problem, int exponent, int64_t group, double* out, double* work) {
  const PowerOfTwo scaling = power_of_two(-exponent);
  const int64_t rows = problem.shape.rows, cols = problem.shape.cols, taps = problem.shape.count();
  const T* data = taps_of<T>(problem, group);
  double *row = work, *column = work + cols;
  double squares = 0, row_sum = 0, column_sum = 0;
  for (int64_t c = 0; c < cols; ++c) column[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) row[c] = 0;
    for (int64_t k = 0; k < taps; ++k) {
      const T* w = data + (k * rows + r) * cols;
      for (int64_t c = 0; c < cols; ++c) row[c] += fabs(scaling(w[c]));
    }
    double sum = 0;
    for (int64_t c = 0; c < cols; ++c) {
      sum += row[c];
      squares += row[c] * row[c];
      column[c] += row[c];
    }
    row_sum = larger(row_sum, sum);
  }
  for (int64_t c = 0; c < cols; ++c) column_sum = larger(column_sum, column[c]);
  const double widen = widened(1 + gamma(2 * taps + rows * cols + 8), 8);
  out[0] = squares * widen;
  out[1] = column_sum * widen;
  out[2] = row_sum * widen;
}

template <class T>
void conv_pack(const ConvProblem& problem, int exponent, int64_t group, double* panels) {
  pack_taps(problem.shape, taps_of<T>(problem, group), power_of_two(-exponent), panels);
}

inline int64_t conv_test_width(int64_t rows) {
  if (rows <= kLaneSide) return kDoubles;
  return rows <= 1024 ? kGramBatch : 1;
}
inline int64_t conv_test_size(int64_t rows, int64_t offsets) {
  if (rows <= kLaneSide) return 2 * offsets * kDoubles + lanes_size(rows);
  return conv_test_width(rows) * 2 * packed_triangle_size(rows) + complex_cholesky_size(rows);
}

inline uint32_t test_in_lanes(const GramTable& table, const CellTests& tests, double* work) {
  const int64_t offsets = table.offsets, n = table.rows;
  double* a = work + 2 * offsets * kDoubles;
  double shifts[kDoubles], limits[kDoubles];
  for (int lane = 0; lane < kDoubles; ++lane) {
    const int64_t cell = smaller<int64_t>(lane, tests.count - 1);
    shifts[lane] = tests.shifts[cell];
    limits[lane] = tests.limits[cell];
    const double* phases = tests.phases + cell * 2 * offsets;
    for (int64_t j = 0; j < offsets; ++j) {
      work[2 * j * kDoubles + lane] = phases[j];
      work[(2 * j + 1) * kDoubles + lane] = phases[offsets + j];
    }
  }
  const DoubleVector squares = evaluate_lanes(table.even, table.odd, n, offsets, work, -tests.sign, a);
  uint32_t proved = 0;
  for (int lane = 0; lane < tests.count; ++lane) proved |= squares[lane] <= limits[lane] ? 1u << lane : 0u;
  const uint32_t all = (1u << tests.count) - 1;
  if (proved == all) return all;
  const DoubleVector shift = tests.sign * load(shifts);
  for (int64_t p = 0; p < n; ++p) {
    double* diagonal = a + (lane_row(p) + p) * 2 * kDoubles;
    store(diagonal, load(diagonal) + shift);
  }
  return (proved | cholesky_lanes(a, n)) & all;
}

inline double squared_frobenius(const double* real, const double* imaginary, int64_t n) {
  const int64_t size = packed_triangle_size(n);
  double squares = 2 * (dot(real, real, size) + dot(imaginary, imaginary, size));
  for (int64_t p = 0; p < n; ++p) squares -= real[packed_row(p) + p] * real[packed_row(p) + p];
  return squares;
}

inline uint32_t conv_test(const GramTable& table, const CellTests& tests, double* work) {
  const int64_t n = table.rows, size = packed_triangle_size(n);
  if (n <= kLaneSide) return test_in_lanes(table, tests, work);
  evaluate_grams(table.even, table.odd, n, table.offsets, tests.phases, tests.count, work);
  double* rest = work + conv_test_width(n) * 2 * size;
  uint32_t mask = 0;
  for (int64_t c = 0; c < tests.count; ++c) {
    double *real = work + c * 2 * size, *imaginary = real + size;
    bool good = squared_frobenius(real, imaginary, n) <= tests.limits[c];
    if (!good) {
      if (tests.sign > 0) {
        for (int64_t i = 0; i < 2 * size; ++i) real[i] = -real[i];
      }
      for (int64_t p = 0; p < n; ++p) real[packed_row(p) + p] += tests.sign * tests.shifts[c];
      good = complex_cholesky(real, imaginary, n, rest);
    }
    mask |= good ? 1u << c : 0u;
  }
  return mask;
}

inline int64_t conv_top_size(int64_t rows) {
  return 2 * packed_triangle_size(rows) + lanczos_size(2 * conv_vector_half(rows)) + 2 * conv_vector_half(rows);
}

// Ritz value of G's largest eigenvalue; x: unit start vector in, Ritz vector out.
inline double conv_top(const GramTable& table, const double* phases, int32_t passes, double tolerance, double* x,
                       double* work) {
  const int64_t size = packed_triangle_size(table.rows), dimension = 2 * conv_vector_half(table.rows);
  evaluate_grams(table.even, table.odd, table.rows, table.offsets, phases, 1, work);
  const auto apply = [&](const double* in, double* out) { multiply_hermitian(work, work + size, table.rows, in, out); };
  return lanczos(apply, dimension, passes, tolerance, x, work + 2 * size, 4).value;
}

// x^* G(theta) x = sum_j cos(j.theta) a_j + sin(j.theta) b_j. out: all a_j, then all b_j. work: 2 packed_size.
inline void conv_coefficients(const GramTable& table, const double* x, double* out, double* work) {
  const int64_t n = table.rows, size = packed_triangle_size(n), half = conv_vector_half(n);
  double *real = work, *imaginary = work + size;
  memset(work, 0, sizeof(double) * 2 * size);
  for (int64_t p = 0; p < n; ++p) {
    for (int64_t q = 0; q <= p; ++q) {
      const double factor = p == q ? 1 : 2;
      real[packed_row(p) + q] = factor * (x[p] * x[q] + x[half + p] * x[half + q]);
      imaginary[packed_row(p) + q] = factor * (x[p] * x[half + q] - x[half + p] * x[q]);
    }
  }
  for (int64_t j = 0; j < table.offsets; ++j) {
    out[j] = dot(table.even + j * size, real, size);
    out[table.offsets + j] = -dot(table.odd + j * size, imaginary, size);
  }
}

inline int64_t conv_lower_size(const ConvProblem& problem) {
  return 5 * (conv_vector_half(problem.shape.rows) + conv_vector_half(problem.shape.cols)) +
         lanczos_size(2 * conv_vector_half(problem.shape.rows));
}

// y = What(theta)^* x, and bound[c] = sum_k sum_r |W_k[r, c]| |x_r| unless it is nullptr. work: 3 halves of cols and
// one of rows.
template <class T>
void symbol_adjoint(const ConvProblem& problem, PowerOfTwo scaling, int64_t group, const int64_t* p, const double* x,
                    double* y, double* bound, double* work) {
  const int64_t rows = problem.shape.rows, cols = problem.shape.cols, taps = problem.shape.count();
  const int64_t in = conv_vector_half(rows), out = conv_vector_half(cols);
  const T* data = taps_of<T>(problem, group);
  double *real = work, *imaginary = work + out, *size = work + 2 * out;
  memset(y, 0, sizeof(double) * 2 * out);
  if (bound != nullptr) memset(bound, 0, sizeof(double) * cols);
  for (int64_t r = 0; r < rows; ++r) size[r] = widened(sqrt(x[r] * x[r] + x[in + r] * x[in + r]), 8);
  for (int64_t k = 0; k < taps; ++k) {
    memset(work, 0, sizeof(double) * 2 * out);
    for (int64_t r = 0; r < rows; ++r) {
      const T* w = data + (k * rows + r) * cols;
      for (int64_t c = 0; c < cols; ++c) {
        const double entry = scaling(w[c]);
        real[c] += entry * x[r];
        imaginary[c] += entry * x[in + r];
        if (bound != nullptr) bound[c] += fabs(entry) * size[r];
      }
    }
    double cosine, sine;
    tap_phase(problem, p, k, &cosine, &sine);
    for (int64_t c = 0; c < cols; ++c) {
      y[c] += cosine * real[c] + sine * imaginary[c];
      y[out + c] += cosine * imaginary[c] - sine * real[c];
    }
  }
}

// z = What(theta) y.
template <class T>
void symbol_forward(const ConvProblem& problem, PowerOfTwo scaling, int64_t group, const int64_t* p, const double* y,
                    double* z) {
  const int64_t rows = problem.shape.rows, cols = problem.shape.cols, taps = problem.shape.count();
  const int64_t out = conv_vector_half(rows), in = conv_vector_half(cols);
  const T* data = taps_of<T>(problem, group);
  memset(z, 0, sizeof(double) * 2 * out);
  for (int64_t k = 0; k < taps; ++k) {
    double cosine, sine;
    tap_phase(problem, p, k, &cosine, &sine);
    for (int64_t r = 0; r < rows; ++r) {
      const T* w = data + (k * rows + r) * cols;
      double real = 0, imaginary = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const double entry = scaling(w[c]);
        real += entry * y[c];
        imaginary += entry * y[in + c];
      }
      z[r] += cosine * real - sine * imaginary;
      z[out + r] += cosine * imaginary + sine * real;
    }
  }
}

// Proved lower bound of the scaled ||What(theta)|| from x; y: the image's direction.
template <class T>
double conv_lower(const ConvProblem& problem, int exponent, int64_t group, const int64_t* p, const double* x, double* y,
                  double* work) {
  const int64_t rows = problem.shape.rows, cols = problem.shape.cols;
  const int64_t in = 2 * conv_vector_half(rows), out = 2 * conv_vector_half(cols);
  double* bound = work;
  symbol_adjoint<T>(problem, power_of_two(-exponent), group, p, x, y, bound, work + out / 2);
  const double image = sqrt(dot(y, y, out)), error = widened(sqrt(dot(bound, bound, cols)));
  const double size = sqrt(dot(x, x, in));
  normalize(y, out);
  const double relative = 1.4142135623730954 * (gamma(rows + problem.shape.count() + 8) + 2 * kPhaseError);
  const double numerator = image * (1 - gamma(2 * cols + 4)) - relative * error;
  return quotient_below(numerator, size, 2 * rows + 4);
}

// The same, from the top vector of What What^* found without forming it. x: start vector, overwritten.
template <class T>
double conv_lower_without_gram(const ConvProblem& problem, int exponent, int64_t group, const int64_t* p, double* x,
                               double* y, double* work) {
  const int64_t scratch = 4 * (conv_vector_half(problem.shape.rows) + conv_vector_half(problem.shape.cols));
  const auto apply = [&](const double* in, double* out) {
    symbol_adjoint<T>(problem, power_of_two(-exponent), group, p, in, y, nullptr, work);
    symbol_forward<T>(problem, power_of_two(-exponent), group, p, y, out);
  };
  lanczos(apply, 2 * conv_vector_half(problem.shape.rows), 60, 0.05 * problem.rtol, x, work + scratch);
  return conv_lower<T>(problem, exponent, group, p, x, y, work);
}

template <class T>
constexpr ConvKernels kConvKernels{conv_examine<T>,    conv_magnitudes<T>,
                                   conv_pack<T>,       autocorrelate,
                                   offset_phases,      dot,
                                   conv_test_width,    conv_test_size,
                                   conv_test,          conv_top,
                                   conv_coefficients,  conv_top_size,
                                   conv_lower<T>,      conv_lower_without_gram<T>,
                                   conv_lower_size,    tap_panels_size,
                                   offset_square_size, packed_triangle_size};
inline const ConvKernels* conv_table(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? &kConvKernels<float> : &kConvKernels<double>;
}

#endif

// Spectral and Frobenius norms of small batches of Jacobians, kDoubles at a time.
#ifndef LIPFAST_REDUCE_INL_H
#define LIPFAST_REDUCE_INL_H

#include "lanczos-inl.h"
#include "matrix-inl.h"
#include "symmetric_top-inl.h"

constexpr int64_t kSmallSide = 64;       // up to here: Gram matrix and a full reduction, in the vector lanes
constexpr int32_t kReducePasses = 1000;  // beyond: Lanczos; never reached in practice

// Tiles of the Gram matrix: products of a few rows with a few others at a time.
constexpr int kGramTileRows = 2, kGramTileColumns = 4;

// Rows that gram_lanes() reads of s: those beyond s only fill its tiles.
inline int64_t gram_lane_rows(int64_t s) { return s + kGramTileColumns; }

// Columns of a slice, so that its rows fit into the nearest cache.
inline int64_t slice_columns(int64_t s, int64_t l) {
  constexpr int64_t kSliceBytes = 32768, kVectorBytes = kDoubles * static_cast<int64_t>(sizeof(double));
  const int64_t fit = kSliceBytes / (gram_lane_rows(s) * kVectorBytes) / kDoubles * kDoubles;
  return smaller(round_up(l, kDoubles), larger<int64_t>(fit, kDoubles));
}

inline int64_t reduce_size(int64_t outputs, int64_t inputs) {
  const int64_t s = smaller(outputs, inputs), l = larger(outputs, inputs);
  if (s > kSmallSide)
    return outputs * inputs + 2 * outputs + inputs + MatrixOperator<double, 1>::size(outputs, inputs) +
           lanczos_size(inputs);
  return (gram_lane_rows(s) * slice_columns(s, l) + s * s + 4 * s) * kDoubles;
}

// Power of two that brings the largest entry below 1. Squares of float32 fit float64 as they are: nothing to do.
inline int scaling_exponent(const float*, int64_t, int64_t, int64_t) { return 0; }
inline int scaling_exponent(const double* entries, int64_t rows, int64_t columns, int64_t row_stride) {
  DoubleVector top{};
  double largest = 0;
  for (int64_t row = 0; row < rows; ++row, entries += row_stride) {
    int64_t i = 0;
    for (; i + kDoubles <= columns; i += kDoubles) {
      const DoubleVector magnitude = absolute(load(entries + i));
      top = magnitude > top ? magnitude : top;
    }
    for (; i < columns; ++i) largest = larger(largest, fabs(entries[i]));
  }
  for (int lane = 0; lane < kDoubles; ++lane) largest = larger(largest, top[lane]);
  int exponent = 0;
  if (largest > 0 && largest < INFINITY) frexp(largest, &exponent);
  return exponent;
}

// Up to kDoubles Jacobians, one in each lane: `size` apart in memory, their rows `row_stride` apart.
template <class T>
struct JacobianLanes {
  const T* jacobian;
  int64_t size, row_stride, count;
  bool wide;                   // rows are the smaller side
  DoubleVector first, second;  // powers of two that scale each lane
  int exponents[kDoubles];

  JacobianLanes(const T* from, int64_t size_of_one, int64_t stride, int64_t lanes, int64_t outputs, int64_t inputs)
      : jacobian(from), size(size_of_one), row_stride(stride), count(lanes), wide(outputs <= inputs) {
    for (int lane = 0; lane < kDoubles; ++lane) {
      exponents[lane] = lane < count ? scaling_exponent(from + lane * size, outputs, inputs, row_stride) : 0;
      const PowerOfTwo scaling = power_of_two(-exponents[lane]);
      first[lane] = scaling.first;
      second[lane] = scaling.second;
    }
  }

  LIPFAST_INLINE DoubleVector scaled(DoubleVector v) const {
    return sizeof(T) == sizeof(float) ? v : v * first * second;  // float32 has exponent 0
  }

  // Entry (i, j), i along the smaller side, of all lanes.
  DoubleVector entry(int64_t i, int64_t j) const {
    const T* at = jacobian + (wide ? i * row_stride + j : j * row_stride + i);
    DoubleVector lanes{};
    for (int64_t t = 0; t < count; ++t) lanes[t] = at[t * size];
    return scaled(lanes);
  }

  // kDoubles entries that lie one after another in memory, of all lanes: block[q] is the q-th.
  LIPFAST_INLINE void entries(const T* at, DoubleVector* block) const {
    LIPFAST_UNROLL
    for (int t = 0; t < kDoubles; ++t) block[t] = t < count ? load_double(at + t * size) : DoubleVector{};
    transpose<double>(block);
    LIPFAST_UNROLL
    for (int q = 0; q < kDoubles; ++q) block[q] = scaled(block[q]);
  }

  // Columns [j0, j0 + depth) of rows [0, s), along the smaller side: x[i * step + j - j0].
  void read(int64_t s, int64_t j0, int64_t depth, int64_t step, DoubleVector* x) const {
    const int64_t whole_rows = wide ? s : s / kDoubles * kDoubles, whole = wide ? depth / kDoubles * kDoubles : depth;
    DoubleVector block[kDoubles];
    for (int64_t i = 0; i < whole_rows; i += wide ? 1 : kDoubles) {
      for (int64_t j = 0; j < whole; j += wide ? kDoubles : 1) {
        entries(jacobian + (wide ? i * row_stride + j0 + j : (j0 + j) * row_stride + i), block);
        for (int q = 0; q < kDoubles; ++q) x[(wide ? i : i + q) * step + (wide ? j + q : j)] = block[q];
      }
    }
    for (int64_t i = 0; i < s; ++i) {
      for (int64_t j = i < whole_rows ? whole : 0; j < depth; ++j) x[i * step + j] = entry(i, j0 + j);
    }
  }
};

// The upper triangle of the s x s Gram matrices of `depth` columns, in tiles: added to what is there if `more`.
inline void gram_lanes(const DoubleVector* x, int64_t s, int64_t depth, int64_t step, bool more, DoubleVector* gram) {
  for (int64_t i = 0; i < s; i += kGramTileRows) {
    const DoubleVector *a = x + i * step, *b = a + step;
    for (int64_t j = i; j < s; j += kGramTileColumns) {
      DoubleVector sums[kGramTileRows][kGramTileColumns] = {};
      for (int64_t k = 0; k < depth; ++k) {
        LIPFAST_UNROLL
        for (int c = 0; c < kGramTileColumns; ++c) {
          const DoubleVector column = x[(j + c) * step + k];
          sums[0][c] += a[k] * column;
          sums[1][c] += b[k] * column;
        }
      }
      // Constant indices: the sums stay in registers.
      LIPFAST_UNROLL
      for (int r = 0; r < kGramTileRows; ++r) {
        LIPFAST_UNROLL
        for (int c = 0; c < kGramTileColumns; ++c) {
          if (i + r >= s || j + c >= s) continue;
          DoubleVector& to = gram[(i + r) * s + j + c];
          to = more ? to + sums[r][c] : sums[r][c];
        }
      }
    }
  }
}

template <class T>
void reduce_large(const T* jacobian, int64_t row_stride, int64_t outputs, int64_t inputs, T* spectral, T* frobenius,
                  double* work) {
  if (row_stride != inputs) {
    T* dense = reinterpret_cast<T*>(work);
    for (int64_t i = 0; i < outputs; ++i) {
      memcpy(dense + i * inputs, jacobian + i * row_stride, sizeof(T) * static_cast<size_t>(inputs));
    }
    jacobian = dense;
  }
  work += outputs * inputs;
  Matrix<T> matrix;
  if (!examine(jacobian, outputs, inputs, nullptr, matrix)) {
    *spectral = *frobenius = NAN;
    return;
  }
  double *x = work, *bound = x + inputs, *y = bound + outputs;
  work = y + outputs;
  double squares = 0;
  for (int64_t i = 0; i < outputs; ++i) {
    double row = 0;
    for (int64_t j = 0; j < inputs; ++j) {
      const double entry = matrix.scaling(jacobian[i * inputs + j]);
      row += entry * entry;
    }
    squares += row;
  }
  *frobenius = static_cast<T>(ldexp(sqrt(squares), matrix.exponent));
  random_vector(0, x, inputs);
  normalize(x, inputs);
  MatrixOperator<T, 1> apply(matrix, nullptr, reinterpret_cast<T*>(work));
  work += MatrixOperator<double, 1>::size(outputs, inputs);
  lanczos(apply, inputs, kReducePasses, sizeof(T) == 4 ? 1e-6 : 1e-13, x, work);
  multiply(matrix, false, nullptr, x, y, bound);
  *spectral = static_cast<T>(ldexp(sqrt(dot(y, y, outputs)), matrix.exponent));
}

// count <= kDoubles Jacobians, one after another in memory, their rows `row_stride` apart; spectral and frobenius:
// count values each.
template <class T>
void reduce(const T* jacobian, int64_t row_stride, int64_t count, int64_t outputs, int64_t inputs, T* spectral,
            T* frobenius, double* work) {
  const int64_t s = smaller(outputs, inputs), size = outputs * row_stride;
  if (s > kSmallSide) {
    for (int64_t i = 0; i < count; ++i)
      reduce_large(jacobian + i * size, row_stride, outputs, inputs, spectral + i, frobenius + i, work);
    return;
  }
  const int64_t l = larger(outputs, inputs), step = slice_columns(s, l);
  DoubleVector *gram = reinterpret_cast<DoubleVector*>(work), *scratch = gram + s * s, *x = scratch + 4 * s;
  memset(static_cast<void*>(x + s * step), 0, sizeof(DoubleVector) * (gram_lane_rows(s) - s) * step);
  const JacobianLanes<T> lanes(jacobian, size, row_stride, count, outputs, inputs);
  for (int64_t j = 0; j < l; j += step) {
    const int64_t depth = smaller(step, l - j);
    lanes.read(s, j, depth, step, x);
    gram_lanes(x, s, depth, step, j > 0, gram);
  }
  DoubleVector trace{};
  for (int64_t i = 0; i < s; ++i) {
    trace += gram[i * s + i];
    for (int64_t j = 0; j < i; ++j) gram[i * s + j] = gram[j * s + i];
  }
  const DoubleVector top = symmetric_top(gram, s, scratch);
  for (int64_t i = 0; i < count; ++i) {
    frobenius[i] = static_cast<T>(ldexp(sqrt(trace[i]), lanes.exponents[i]));
    // top <= trace holds exactly; rounding may break it for matrices of rank one.
    const double value = top[i] > trace[i] ? trace[i] : top[i];
    spectral[i] = static_cast<T>(ldexp(sqrt(value < 0 ? 0 : value), lanes.exponents[i]));
  }
}

#endif

// A dense row-major matrix of T, scaled by a power of two so that its entries lie in (-1, 1), and products with it.
#ifndef LIPFAST_MATRIX_INL_H
#define LIPFAST_MATRIX_INL_H

#include "vector-inl.h"

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols;
  int exponent;  // scaled entries are data * 2^-exponent, of largest magnitude in [1/2, 1)
  PowerOfTwo scaling;
  double largest;  // unscaled

  // A float's power of two fits into one double.
  LIPFAST_INLINE DoubleVector scaled(const T* p) const {
    const DoubleVector entries = load_double(p);
    return sizeof(T) == 4 ? entries * (scaling.first * scaling.second) : entries * scaling.first * scaling.second;
  }
};

// Largest magnitude of `size` entries; NaN when one of them is not finite.
template <class T>
T largest_entry(const T* data, int64_t size) {
  typedef typename Simd<T>::Vector Vector;
  constexpr int kLanes = Simd<T>::kLanes, kChains = 4;  // one chain of additions would wait for itself
  Vector top[kChains] = {}, poison[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
    LIPFAST_UNROLL
    for (int c = 0; c < kChains; ++c) {
      const Vector v = load(data + i + c * kLanes);
      const Vector magnitude = v < 0 ? -v : v;
      top[c] = magnitude > top[c] ? magnitude : top[c];
      poison[c] += v - v;  // NaN as soon as one entry is NaN or infinite
    }
  }
  T largest = 0, poisoned = 0;
  for (; i < size; ++i) {
    largest = larger<T>(largest, data[i] < 0 ? -data[i] : data[i]);
    poisoned += data[i] - data[i];
  }
  for (int c = 0; c < kChains; ++c) {
    for (int j = 0; j < kLanes; ++j) largest = larger<T>(largest, top[c][j]);
    poisoned += horizontal_sum<T>(poison[c]);
  }
  return largest + poisoned;
}

// False when an entry is not finite.
template <class T>
bool examine(const T* data, int64_t rows, int64_t cols, const Parallel* parallel, Matrix<T>& matrix) {
  constexpr int64_t kPieces = 16;
  const int64_t size = rows * cols, piece = size < (int64_t{1} << 20) ? size : (size + kPieces - 1) / kPieces;
  T tops[kPieces] = {};
  for_items(parallel, (size + piece - 1) / piece, [&](int64_t item) {
    tops[item] = largest_entry(data + item * piece, smaller(piece, size - item * piece));
  });
  T largest = 0;
  for (T top : tops) {
    if (!(top >= 0)) return false;
    largest = larger(largest, top);
  }
  int exponent = 0;
  if (largest > 0) frexp(static_cast<double>(largest), &exponent);
  matrix = {data, rows, cols, exponent, power_of_two(-exponent), static_cast<double>(largest)};
  return true;
}

// Z = (2^-e W)^T (2^-e W) V for kVectors vectors in one pass over W: the rows of a strip are used again for Z while
// they are in the cache. The scaling is spread over V, Y and Z so that no intermediate leaves T's range.
//
// W is cut into chunks of rows by its size alone, each with a Z of its own, added up in order: the result does not
// depend on the number of threads.
constexpr int64_t kStripRows = 16;       // rows whose products with V are kept while they are in the cache
constexpr int64_t kStripColumns = 1024;  // columns of them that pass together
constexpr int64_t kStreamColumns = 256;  // the same for a matrix that comes from memory
constexpr int64_t kMaxChunks = 16;

LIPFAST_INLINE int64_t operator_chunks(int64_t rows, int64_t cols) {
  return rows * cols < (int64_t{1} << 20) ? 1 : smaller(kMaxChunks, (rows + kStripRows - 1) / kStripRows);
}

template <class T, int kVectors>
struct MatrixOperator {
  typedef typename Simd<T>::Vector Vector;
  static constexpr int kLanes = Simd<T>::kLanes;
  // Rows in registers: kRows x kVectors sums, beside kVectors + 1 operands.
  static constexpr int kRows = kVectors == 1 ? 8 : (LIPFAST_VECTOR_BYTES == 64 ? 4 : 2);

  const Matrix<T>& matrix;
  const Parallel* parallel;
  T* v;  // packed(cols)
  T* z;  // chunks x packed(cols)

  // V and Z are packed: kLanes columns of the first vector, the same of the second, and so on. As rows of their own,
  // with a power of two between them, they and the rows of W would fight for the same few places in L1.
  static int64_t packed(int64_t cols) { return round_up(cols, kLanes) * kVectors; }
  LIPFAST_INLINE static int64_t at(int64_t j, int64_t c) { return (j / kLanes * kVectors + c) * kLanes + j % kLanes; }

  // In elements of T, for every width of vectors.
  static int64_t size(int64_t rows, int64_t cols) {
    return (1 + operator_chunks(rows, cols)) * kVectors * round_up(cols, 16);
  }

  MatrixOperator(const Matrix<T>& of, const Parallel* threads, T* work)
      : matrix(of), parallel(threads), v(work), z(work + packed(of.cols)) {}

  // in, out: kVectors x cols.
  void operator()(const double* in, double* out) {
    const int64_t rows = matrix.rows, cols = matrix.cols, size = packed(cols), chunks = operator_chunks(rows, cols);
    const int half = matrix.exponent / 2;
    const PowerOfTwo outer = power_of_two(-half), inner = power_of_two(-2 * (matrix.exponent - half));
    for (int64_t c = 0; c < kVectors; ++c) {
      int64_t j = 0;
      for (; j + kLanes <= cols; j += kLanes) {
        T* lanes = v + at(j, c);
        for (int64_t k = 0; k < kLanes; ++k) lanes[k] = static_cast<T>(outer(in[c * cols + j + k]));
      }
      for (; j < cols; ++j) v[at(j, c)] = static_cast<T>(outer(in[c * cols + j]));
    }
    const int64_t height = round_up((rows + chunks - 1) / chunks, kStripRows);
    for_items(parallel, chunks, [&](int64_t chunk) {
      T* sum = z + chunk * size;
      memset(sum, 0, sizeof(T) * size);
      const int64_t first = smaller(rows, chunk * height), end = smaller(rows, (chunk + 1) * height);
      if (kVectors == 1) {
        for (int64_t i = first; i < end; i += kStripRows) strip(i, smaller(kStripRows, end - i), inner, sum);
      } else {
        stream(first, end, inner, sum);
      }
    });
    constexpr int64_t kPiece = 256;
    for_items(parallel, (cols + kPiece - 1) / kPiece, [&](int64_t piece) {
      add_chunks(chunks, piece * kPiece, smaller(cols, (piece + 1) * kPiece), outer, out);
    });
  }

  // Columns [first, end) of the chunks' sums, in float64.
  void add_chunks(int64_t chunks, int64_t first, int64_t end, PowerOfTwo outer, double* out) const {
    const int64_t cols = matrix.cols, size = packed(cols);
    for (int64_t c = 0; c < kVectors; ++c) {
      for (int64_t j0 = first; j0 < end; j0 += kLanes) {
        const int64_t width = smaller<int64_t>(kLanes, end - j0);
        double total[kLanes] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T* sum = z + chunk * size + at(j0, c);
          for (int64_t k = 0; k < kLanes; ++k) total[k] += sum[k];
        }
        double* target = out + c * cols + j0;
        if (width == kLanes) {
          for (int64_t k = 0; k < kLanes; ++k) target[k] = outer(total[k]);
        } else {
          for (int64_t k = 0; k < width; ++k) target[k] = outer(total[k]);
        }
      }
    }
  }

  // Rows [first, first + count): both products, the second from L1. For a matrix in L2.
  void strip(int64_t first, int64_t count, PowerOfTwo inner, T* sum) const {
    const T* w = matrix.data + first * matrix.cols;
    Vector sums[kStripRows][kVectors];
    // Stores: `= {}` would become a string instruction that takes longer than the products of a short strip.
    LIPFAST_UNROLL
    for (int r = 0; r < kStripRows; ++r) {
      for (int c = 0; c < kVectors; ++c) sums[r][c] = Vector{};
    }
    T y[kStripRows][kVectors];
    for (int64_t j = 0; j < matrix.cols; j += kStripColumns) project_strip(w, count, j, kStripColumns, sums);
    finish_products(w, count, sums, inner, y);
    for (int64_t j = 0; j < matrix.cols; j += kStripColumns) expand_strip(w, count, j, kStripColumns, y, sum);
  }

  // Rows [first, end) of a matrix that comes from memory: while a strip's products with V wait for it, those of the
  // strip before, from L2, are added to the sum.
  void stream(int64_t first, int64_t end, PowerOfTwo inner, T* sum) const {
    const int64_t cols = matrix.cols;
    T y[kStripRows][kVectors];
    int64_t before = 0;  // rows of the strip before
    for (int64_t i = first; before > 0 || i < end; i += kStripRows) {
      const int64_t count = i < end ? smaller(kStripRows, end - i) : 0;
      const T *w = matrix.data + i * cols, *last = w - kStripRows * cols;
      Vector sums[kStripRows][kVectors] = {};
      const bool whole = count == kStripRows && before == kStripRows;
      for (int64_t j = 0; j < cols; j += kStreamColumns) {
        if (whole) {
          advance_strip(w, j, y, sums, sum);
        } else {
          project_strip(w, count, j, kStreamColumns, sums);
          expand_strip(last, before, j, kStreamColumns, y, sum);
        }
      }
      finish_products(w, count, sums, inner, y);
      before = count;
    }
  }

  // y[r][c] = w_r . v_c, scaled: the lanes of the sums (zero beyond `count` rows), and the columns that fill no vector.
  LIPFAST_INLINE void finish_products(const T* w, int64_t count, const Vector (*sums)[kVectors], PowerOfTwo inner,
                                      T (*y)[kVectors]) const {
    const int64_t cols = matrix.cols;
    LIPFAST_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      T totals[kStripRows];
      LIPFAST_UNROLL
      for (int64_t r = 0; r < kStripRows; r += kLanes) {
        Vector rows[kLanes];
        LIPFAST_UNROLL
        for (int k = 0; k < kLanes; ++k) rows[k] = sums[r + k][c];
        store(totals + r, lane_sums<T>(rows));
      }
      for (int64_t j = cols / kLanes * kLanes; j < cols; ++j) {
        for (int64_t r = 0; r < count; ++r) totals[r] += w[r * cols + j] * v[at(j, c)];
      }
      LIPFAST_UNROLL
      for (int64_t r = 0; r < kStripRows; ++r) y[r][c] = static_cast<T>(inner(static_cast<double>(totals[r])));
    }
  }

  // Columns [j, j + columns) of the first `count` rows from w on.
  LIPFAST_INLINE void project_strip(const T* w, int64_t count, int64_t j, int64_t columns,
                                    Vector (*sums)[kVectors]) const {
    const int64_t cols = matrix.cols, end = smaller(j + columns, cols / kLanes * kLanes);
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) project<kRows>(w + r * cols, j, end, sums + r);
    for (; r < count; ++r) project<1>(w + r * cols, j, end, sums + r);
  }
  LIPFAST_INLINE void expand_strip(const T* w, int64_t count, int64_t j, int64_t columns, const T (*y)[kVectors],
                                   T* sum) const {
    const int64_t cols = matrix.cols, end = smaller(j + columns, cols);
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) expand<kRows>(w + r * cols, j, end, y + r, sum);
    for (; r < count; ++r) expand<1>(w + r * cols, j, end, y + r, sum);
  }

  // project_strip of the rows from w on and expand_strip of those before them, in one loop: two loops in turn would
  // leave the memory idle during the second.
  LIPFAST_INLINE void advance_strip(const T* w, int64_t j, const T (*y)[kVectors], Vector (*sums)[kVectors],
                                    T* sum) const {
    const int64_t cols = matrix.cols, end = smaller(j + kStreamColumns, cols / kLanes * kLanes);
    for (int64_t r = 0; r < kStripRows; r += kRows) advance(w + r * cols, j, end, y + r, sums + r, sum);
    if (end < smaller(j + kStreamColumns, cols)) {
      const T* last = w - kStripRows * cols;
      for (int64_t r = 0; r < kStripRows; r += kRows) expand<kRows>(last + r * cols, end, cols, y + r, sum);
    }
  }
  LIPFAST_INLINE void advance(const T* w, int64_t j, int64_t end, const T (*y)[kVectors], Vector (*sums)[kVectors],
                              T* sum) const {
    const int64_t cols = matrix.cols;
    const T* last = w - kStripRows * cols;
    Vector local[kRows][kVectors];
    copy_tile<kRows>(sums, local);
    for (; j < end; j += kLanes) {
      Vector entry[kRows], before[kRows];
      LIPFAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        entry[r] = load(w + r * cols + j);
        before[r] = load(last + r * cols + j);
      }
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        const Vector operand = load(v + at(j, c));
        Vector total = load(sum + at(j, c));
        LIPFAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
          local[r][c] += entry[r] * operand;
          total += before[r] * y[r][c];
        }
        store(sum + at(j, c), total);
      }
    }
    copy_tile<kRows>(local, sums);
  }

  template <int kCount>
  LIPFAST_INLINE static void copy_tile(const Vector (*from)[kVectors], Vector (*to)[kVectors]) {
    LIPFAST_UNROLL
    for (int r = 0; r < kCount; ++r) {
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) to[r][c] = from[r][c];
    }
  }

  // sums[r][c] += w_r . v_c lane by lane over columns [j, end), whole vectors.
  template <int kCount>
  LIPFAST_INLINE void project(const T* w, int64_t j, int64_t end, Vector (*sums)[kVectors]) const {
    const int64_t cols = matrix.cols;
    Vector local[kCount][kVectors];
    copy_tile<kCount>(sums, local);
    for (; j < end; j += kLanes) {
      Vector operand[kVectors];
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) operand[c] = load(v + at(j, c));
      LIPFAST_UNROLL
      for (int r = 0; r < kCount; ++r) {
        const Vector entry = load(w + r * cols + j);
        LIPFAST_UNROLL
        for (int c = 0; c < kVectors; ++c) local[r][c] += entry * operand[c];
      }
    }
    copy_tile<kCount>(local, sums);
  }

  // sum_c += y_rc w_r over columns [j, end).
  template <int kCount>
  LIPFAST_INLINE void expand(const T* w, int64_t j, int64_t end, const T (*y)[kVectors], T* sum) const {
    const int64_t cols = matrix.cols;
    // Several vectors share a broadcast y: loads are what limits blocks.
    constexpr int kWidth = kVectors == 1 ? 1 : 2;
    for (; j + kWidth * kLanes <= end; j += kWidth * kLanes) expand_vectors<kCount, kWidth>(w, j, y, sum);
    for (; j + kLanes <= end; j += kLanes) expand_vectors<kCount, 1>(w, j, y, sum);
    for (; j < end; ++j) {
      for (int c = 0; c < kVectors; ++c) {
        for (int r = 0; r < kCount; ++r) sum[at(j, c)] += w[r * cols + j] * y[r][c];
      }
    }
  }
  template <int kCount, int kWidth>
  LIPFAST_INLINE void expand_vectors(const T* w, int64_t j, const T (*y)[kVectors], T* sum) const {
    const int64_t cols = matrix.cols;
    Vector entry[kCount][kWidth];
    load_tile(w + j, cols, entry);
    LIPFAST_UNROLL
    for (int c = 0; c < kVectors; ++c) {
      Vector total[kWidth];
      LIPFAST_UNROLL
      for (int k = 0; k < kWidth; ++k) total[k] = load(sum + at(j + k * kLanes, c));
      LIPFAST_UNROLL
      for (int r = 0; r < kCount; ++r) {
        const Vector factor = splat(y[r][c]);
        LIPFAST_UNROLL
        for (int k = 0; k < kWidth; ++k) total[k] += entry[r][k] * factor;
      }
      LIPFAST_UNROLL
      for (int k = 0; k < kWidth; ++k) store(sum + at(j + k * kLanes, c), total[k]);
    }
  }
};

// y = (2^-e W) x and bound = |W| |x| beside it for rows [first, first + kCount): float64, whatever T.
template <int kCount, class T>
LIPFAST_INLINE void multiply_rows(const Matrix<T>& w, int64_t first, const double* x, double* y, double* bound) {
  const int64_t cols = w.cols;
  const T* row = w.data + first * cols;
  DoubleVector sums[kCount] = {}, bounds[kCount] = {};
  int64_t j = 0;
  for (; j + kDoubles <= cols; j += kDoubles) {
    const DoubleVector xj = load(x + j);
    LIPFAST_UNROLL
    for (int r = 0; r < kCount; ++r) {
      const DoubleVector product = w.scaled(row + r * cols + j) * xj;
      sums[r] += product;
      bounds[r] += absolute(product);
    }
  }
  for (int r = 0; r < kCount; ++r) {
    double sum = horizontal_sum<double>(sums[r]), size = horizontal_sum<double>(bounds[r]);
    for (int64_t k = j; k < cols; ++k) {
      const double product = w.scaling(row[r * cols + k]) * x[k];
      sum += product;
      size += fabs(product);
    }
    y[first + r] = sum;
    bound[first + r] = size;
  }
}

// y += (2^-e W)^T x and bound += |W|^T |x|, of the same rows.
template <int kCount, class T>
LIPFAST_INLINE void add_rows(const Matrix<T>& w, int64_t first, const double* x, double* y, double* bound) {
  const int64_t cols = w.cols;
  const T* row = w.data + first * cols;
  int64_t j = 0;
  for (; j + kDoubles <= cols; j += kDoubles) {
    DoubleVector sum = load(y + j), size = load(bound + j);
    LIPFAST_UNROLL
    for (int r = 0; r < kCount; ++r) {
      const DoubleVector product = w.scaled(row + r * cols + j) * x[first + r];
      sum += product;
      size += absolute(product);
    }
    store(y + j, sum);
    store(bound + j, size);
  }
  for (; j < cols; ++j) {
    for (int r = 0; r < kCount; ++r) {
      const double product = w.scaling(row[r * cols + j]) * x[first + r];
      y[j] += product;
      bound[j] += fabs(product);
    }
  }
}

// y = (2^-e W) x, or with the transpose, and bound = |W| |x|: every product and every sum rounded once.
template <class T>
void multiply(const Matrix<T>& w, bool transposed, const Parallel* parallel, const double* x, double* y,
              double* bound) {
  constexpr int64_t kRows = 4, kBlock = 256;
  if (transposed) {
    for (int64_t j = 0; j < w.cols; ++j) y[j] = bound[j] = 0;
    int64_t i = 0;
    for (; i + kRows <= w.rows; i += kRows) add_rows<kRows>(w, i, x, y, bound);
    for (; i < w.rows; ++i) add_rows<1>(w, i, x, y, bound);
    return;
  }
  for_items(parallel, (w.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t end = smaller(w.rows, (block + 1) * kBlock);
    int64_t i = block * kBlock;
    for (; i + kRows <= end; i += kRows) multiply_rows<kRows>(w, i, x, y, bound);
    for (; i < end; ++i) multiply_rows<1>(w, i, x, y, bound);
  });
}

#endif

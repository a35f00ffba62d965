// Spectral and Frobenius norms of small batches of Jacobians, kDoubles at a time.

constexpr int64_t kSmallSide = 64;       // up to here: Gram matrix and a full reduction, in the vector lanes
constexpr int32_t kReducePasses = 1000;  // beyond: Lanczos; never reached in practice

// Tiles of the Gram matrix, whose sums over the lanes are taken together.
constexpr int kGramTileRows = 2, kGramTileColumns = 4;

// Rows that gram_lane() reads of s: those beyond s only fill its tiles.
inline int64_t gram_lane_rows(int64_t s) { return s + kGramTileColumns; }

inline int64_t reduce_size(int64_t outputs, int64_t inputs) {
  const int64_t s = smaller(outputs, inputs), l = larger(outputs, inputs);
  if (s > kSmallSide)
    return outputs * inputs + 2 * outputs + inputs + MatrixOperator<double, 1>::size(outputs, inputs) +
           lanczos_size(inputs);
  return gram_lane_rows(s) * round_up(l, kDoubles) + (s * s + 4 * s) * kDoubles;
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

// The Jacobian as [s][stride] doubles scaled by 2^-exponent, smaller side first, zero-padded. Returns the exponent.
template <class T>
int widen_jacobian(const T* jacobian, int64_t outputs, int64_t inputs, int64_t row_stride, int64_t stride,
                   double* out) {
  const int exponent = scaling_exponent(jacobian, outputs, inputs, row_stride);
  const PowerOfTwo scaling = power_of_two(-exponent);
  const bool wide = outputs <= inputs;
  const int64_t s = smaller(outputs, inputs), l = larger(outputs, inputs);
  for (int64_t i = 0; i < s; ++i) {
    double* row = out + i * stride;
    int64_t j = 0;
    if (wide) {
      for (; j + kDoubles <= l; j += kDoubles) {
        store(row + j, load_double(jacobian + i * row_stride + j) * scaling.first * scaling.second);
      }
    }
    for (; j < l; ++j) row[j] = scaling(wide ? jacobian[i * row_stride + j] : jacobian[j * row_stride + i]);
    for (; j < stride; ++j) row[j] = 0;
  }
  return exponent;
}

// Lane `lane` of the s x s Gram matrices: entries [i][j][lane].
inline void gram_lane(const double* rows, int64_t s, int64_t stride, double* gram, int lane) {
  constexpr int kEntries = kGramTileRows * kGramTileColumns;
  for (int64_t i = 0; i < s; i += kGramTileRows) {
    const double *a = rows + i * stride, *b = a + stride;
    for (int64_t j = i; j < s; j += kGramTileColumns) {
      DoubleVector sums[kEntries] = {};
      for (int64_t k = 0; k < stride; k += kDoubles) {
        const DoubleVector ak = load(a + k), bk = load(b + k);
        LIPFAST_UNROLL
        for (int c = 0; c < kGramTileColumns; ++c) {
          const DoubleVector ck = load(rows + (j + c) * stride + k);
          sums[c] += ak * ck;
          sums[kGramTileColumns + c] += bk * ck;
        }
      }
      double value[kEntries];
      for (int e = 0; e < kEntries; e += kDoubles) store(value + e, lane_sums<double>(sums + e));
      for (int r = 0; r < smaller<int64_t>(kGramTileRows, s - i); ++r) {
        for (int c = 0; c < smaller<int64_t>(kGramTileColumns, s - j); ++c) {
          const int64_t row = i + r, column = j + c;
          gram[(row * s + column) * kDoubles + lane] = gram[(column * s + row) * kDoubles + lane] =
              value[r * kGramTileColumns + c];
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
  const int64_t stride = round_up(larger(outputs, inputs), kDoubles);
  double* gram = work;
  double* scratch = gram + s * s * kDoubles;
  double* rows = scratch + 4 * s * kDoubles;
  memset(gram, 0, sizeof(double) * s * s * kDoubles);
  memset(rows + s * stride, 0, sizeof(double) * (gram_lane_rows(s) - s) * stride);
  int exponents[kDoubles] = {};
  for (int64_t i = 0; i < count; ++i) {
    exponents[i] = widen_jacobian(jacobian + i * size, outputs, inputs, row_stride, stride, rows);
    gram_lane(rows, s, stride, gram, static_cast<int>(i));
  }
  double trace[kDoubles] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < s; ++j) trace[i] += gram[(j * s + j) * kDoubles + i];
  }
  const DoubleVector top =
      symmetric_top(reinterpret_cast<DoubleVector*>(gram), s, reinterpret_cast<DoubleVector*>(scratch));
  for (int64_t i = 0; i < count; ++i) {
    frobenius[i] = static_cast<T>(ldexp(sqrt(trace[i]), exponents[i]));
    // top <= trace holds exactly; rounding may break it for matrices of rank one.
    const double value = top[i] > trace[i] ? trace[i] : top[i];
    spectral[i] = static_cast<T>(ldexp(sqrt(value < 0 ? 0 : value), exponents[i]));
  }
}

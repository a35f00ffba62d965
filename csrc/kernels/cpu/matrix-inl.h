// A dense row-major matrix of T, scaled by a power of two so that its entries lie in (-1, 1), and products with it.

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols;
  int exponent;  // scaled entries are data * 2^-exponent, of largest magnitude in [1/2, 1)
  PowerOfTwo scaling;
  double largest;  // unscaled
};

// False when an entry is not finite.
template <class T>
bool examine(const T* data, int64_t rows, int64_t cols, Matrix<T>& matrix) {
  typename Simd<T>::Vector top{};
  const int64_t size = rows * cols;
  constexpr int kLanes = Simd<T>::kLanes;
  T largest = 0, poison = 0;
  typename Simd<T>::Vector poisons{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const typename Simd<T>::Vector v = load(data + i);
    const typename Simd<T>::Vector magnitude = v < 0 ? -v : v;
    top = magnitude > top ? magnitude : top;
    poisons += v - v;  // NaN as soon as one entry is NaN or infinite
  }
  for (; i < size; ++i) {
    largest = larger<T>(largest, data[i] < 0 ? -data[i] : data[i]);
    poison += data[i] - data[i];
  }
  for (int j = 0; j < kLanes; ++j) {
    largest = larger<T>(largest, top[j]);
    poison += poisons[j];
  }
  if (!(poison == 0)) return false;
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
  T* v;  // kVectors x cols
  T* z;  // chunks x kVectors x cols

  static int64_t size(int64_t rows, int64_t cols) { return (1 + operator_chunks(rows, cols)) * kVectors * cols; }

  MatrixOperator(const Matrix<T>& of, const Parallel* threads, T* work)
      : matrix(of), parallel(threads), v(work), z(work + kVectors * of.cols) {}

  // in, out: kVectors x cols.
  void operator()(const double* in, double* out) {
    const int64_t rows = matrix.rows, size = kVectors * matrix.cols, chunks = operator_chunks(rows, matrix.cols);
    const int half = matrix.exponent / 2;
    const PowerOfTwo outer = power_of_two(-half), inner = power_of_two(-2 * (matrix.exponent - half));
    for (int64_t j = 0; j < size; ++j) v[j] = static_cast<T>(outer(in[j]));
    const int64_t height = round_up((rows + chunks - 1) / chunks, kStripRows);
    for_items(parallel, chunks, [&](int64_t chunk) {
      T* sum = z + chunk * size;
      for (int64_t j = 0; j < size; ++j) sum[j] = 0;
      for (int64_t i = chunk * height; i < smaller(rows, (chunk + 1) * height); i += kStripRows) {
        strip(i, smaller(kStripRows, rows - i), inner, sum);
      }
    });
    for (int64_t j = 0; j < size; ++j) {
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += z[chunk * size + j];
      out[j] = outer(total);
    }
  }

  void strip(int64_t first, int64_t count, PowerOfTwo inner, T* sum) const {
    const int64_t cols = matrix.cols;
    const T* w = matrix.data + first * cols;
    double products[kStripRows][kVectors] = {};
    for (int64_t j = 0; j < cols; j += kStripColumns) {
      const int64_t width = smaller(kStripColumns, cols - j);
      int64_t r = 0;
      for (; r + kRows <= count; r += kRows) project<kRows>(w + r * cols + j, j, width, products + r);
      for (; r < count; ++r) project<1>(w + r * cols + j, j, width, products + r);
    }
    T y[kStripRows][kVectors];
    for (int64_t r = 0; r < count; ++r) {
      for (int c = 0; c < kVectors; ++c) y[r][c] = static_cast<T>(inner(products[r][c]));
    }
    for (int64_t j = 0; j < cols; j += kStripColumns) {
      const int64_t width = smaller(kStripColumns, cols - j);
      int64_t r = 0;
      for (; r + kRows <= count; r += kRows) expand<kRows>(w + r * cols + j, j, width, y + r, sum);
      for (; r < count; ++r) expand<1>(w + r * cols + j, j, width, y + r, sum);
    }
  }

  // products[r][c] += w_r . v_c over columns [j0, j0 + width).
  template <int kCount>
  LIPFAST_INLINE void project(const T* w, int64_t j0, int64_t width, double (*products)[kVectors]) const {
    const int64_t cols = matrix.cols;
    Vector sums[kCount][kVectors] = {};
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      Vector operand[kVectors];
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) operand[c] = load(v + c * cols + j0 + j);
      LIPFAST_UNROLL
      for (int r = 0; r < kCount; ++r) {
        const Vector entry = load(w + r * cols + j);
        LIPFAST_UNROLL
        for (int c = 0; c < kVectors; ++c) sums[r][c] += entry * operand[c];
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int c = 0; c < kVectors; ++c) {
        double total = horizontal_sum<T>(sums[r][c]);
        for (int64_t k = j; k < width; ++k) total += w[r * cols + k] * v[c * cols + j0 + k];
        products[r][c] += total;
      }
    }
  }

  // sum_c += y_rc w_r over columns [j0, j0 + width).
  template <int kCount>
  LIPFAST_INLINE void expand(const T* w, int64_t j0, int64_t width, const T (*y)[kVectors], T* sum) const {
    const int64_t cols = matrix.cols;
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      Vector entry[kCount];
      LIPFAST_UNROLL
      for (int r = 0; r < kCount; ++r) {
        entry[r] = load(w + r * cols + j);
        // The next strip of a large matrix comes while this one is used; what lies in L2 anyway would only cost slots.
        if (kVectors > 1) __builtin_prefetch(w + (r + kStripRows) * cols + j, 0, 2);
      }
      LIPFAST_UNROLL
      for (int c = 0; c < kVectors; ++c) {
        T* out = sum + c * cols + j0 + j;
        Vector total = load(out);
        LIPFAST_UNROLL
        for (int r = 0; r < kCount; ++r) total += entry[r] * y[r][c];
        store(out, total);
      }
    }
    for (; j < width; ++j) {
      for (int c = 0; c < kVectors; ++c) {
        for (int r = 0; r < kCount; ++r) sum[c * cols + j0 + j] += w[r * cols + j] * y[r][c];
      }
    }
  }
};

// y = (2^-e W) x, or with the transpose, and bound = |W| |x| beside it: float64, whatever T.
template <class T>
void multiply(const Matrix<T>& w, bool transposed, const double* x, double* y, double* bound) {
  const int64_t cols = w.cols;
  if (transposed) {
    for (int64_t j = 0; j < cols; ++j) y[j] = bound[j] = 0;
  }
  for (int64_t i = 0; i < w.rows; ++i) {
    const T* row = w.data + i * cols;
    int64_t j = 0;
    if (transposed) {
      const double xi = x[i], size = fabs(x[i]);
      for (; j + kDoubles <= cols; j += kDoubles) {
        const DoubleVector entry = load_double(row + j) * w.scaling.first * w.scaling.second;
        store(y + j, load(y + j) + entry * xi);
        store(bound + j, load(bound + j) + absolute(entry) * size);
      }
      for (; j < cols; ++j) {
        const double entry = w.scaling(row[j]);
        y[j] += entry * xi;
        bound[j] += fabs(entry) * size;
      }
    } else {
      DoubleVector sums{}, bounds{};
      for (; j + kDoubles <= cols; j += kDoubles) {
        const DoubleVector product = load_double(row + j) * w.scaling.first * w.scaling.second * load(x + j);
        sums += product;
        bounds += absolute(product);
      }
      double sum = horizontal_sum<double>(sums), size = horizontal_sum<double>(bounds);
      for (; j < cols; ++j) {
        sum += w.scaling(row[j]) * x[j];
        size += fabs(w.scaling(row[j]) * x[j]);
      }
      y[i] = sum;
      bound[i] = size;
    }
  }
}

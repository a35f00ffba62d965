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

// z = (2^-e W)^T (2^-e W) v in one pass over W, four rows at a time: the rows of a block are used again for z while
// they are in the cache. The scaling is spread over v, y and z so that no intermediate leaves T's range.
template <class T>
struct MatrixOperator {
  const Matrix<T>& matrix;
  T* v;  // cols
  T* z;  // cols

  void operator()(const double* in, double* out) {
    const int64_t rows = matrix.rows, cols = matrix.cols;
    const int half = matrix.exponent / 2;
    const PowerOfTwo outer = power_of_two(-half), inner = power_of_two(-2 * (matrix.exponent - half));
    for (int64_t j = 0; j < cols; ++j) {
      v[j] = static_cast<T>(outer(in[j]));
      z[j] = 0;
    }
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) block<4>(matrix.data + i * cols, cols, inner);
    for (; i < rows; ++i) block<1>(matrix.data + i * cols, cols, inner);
    for (int64_t j = 0; j < cols; ++j) out[j] = outer(static_cast<double>(z[j]));
  }

  template <int kRows>
  LIPFAST_INLINE void block(const T* w, int64_t cols, PowerOfTwo inner) {
    typedef typename Simd<T>::Vector Vector;
    constexpr int kLanes = Simd<T>::kLanes;
    Vector sum[kRows] = {};
    T y[kRows];
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      const Vector vj = load(v + j);
      LIPFAST_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += load(w + r * cols + j) * vj;
    }
    for (int r = 0; r < kRows; ++r) {
      double total = horizontal_sum<T>(sum[r]);
      for (int64_t k = j; k < cols; ++k) total += w[r * cols + k] * v[k];
      y[r] = static_cast<T>(inner(total));
    }
    for (j = 0; j + kLanes <= cols; j += kLanes) {
      Vector zj = load(z + j);
      LIPFAST_UNROLL
      for (int r = 0; r < kRows; ++r) zj += load(w + r * cols + j) * y[r];
      store(z + j, zj);
    }
    for (; j < cols; ++j) {
      for (int r = 0; r < kRows; ++r) z[j] += w[r * cols + j] * y[r];
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

// Spectral and Frobenius norms of small batches of Jacobians, kDoubles at a time.

constexpr int64_t kSmallSide = 64;       // up to here: Gram matrix and a full reduction, in the vector lanes
constexpr int32_t kReducePasses = 1000;  // beyond: Lanczos; never reached in practice

inline int64_t reduce_size(int64_t outputs, int64_t inputs) {
  const int64_t s = smaller(outputs, inputs), l = larger(outputs, inputs);
  if (s > kSmallSide)
    return 2 * outputs + inputs + MatrixOperator<double, 1>::size(outputs, inputs) + lanczos_size(inputs);
  return s * round_up(l, kDoubles) + (s * s + 4 * s + 2) * kDoubles;
}

// Power of two that brings the largest entry below 1. Squares of float32 fit float64 as they are: nothing to do.
inline int scaling_exponent(const float*, int64_t) { return 0; }
inline int scaling_exponent(const double* entries, int64_t size) {
  DoubleVector top{};
  int64_t i = 0;
  for (; i + kDoubles <= size; i += kDoubles) {
    const DoubleVector magnitude = absolute(load(entries + i));
    top = magnitude > top ? magnitude : top;
  }
  double largest = 0;
  for (int lane = 0; lane < kDoubles; ++lane) largest = larger(largest, top[lane]);
  for (; i < size; ++i) largest = larger(largest, fabs(entries[i]));
  int exponent = 0;
  if (largest > 0 && largest < INFINITY) frexp(largest, &exponent);
  return exponent;
}

// The Jacobian as [s][stride] doubles scaled by 2^-exponent, smaller side first, zero-padded. Returns the exponent.
template <class T>
int widen_jacobian(const T* jacobian, int64_t outputs, int64_t inputs, int64_t stride, double* out) {
  const int exponent = scaling_exponent(jacobian, outputs * inputs);
  const PowerOfTwo scaling = power_of_two(-exponent);
  const bool wide = outputs <= inputs;
  const int64_t s = smaller(outputs, inputs), l = larger(outputs, inputs);
  for (int64_t i = 0; i < s; ++i) {
    double* row = out + i * stride;
    int64_t j = 0;
    if (wide) {
      for (; j + kDoubles <= l; j += kDoubles) {
        store(row + j, load_double(jacobian + i * l + j) * scaling.first * scaling.second);
      }
    }
    for (; j < l; ++j) row[j] = scaling(wide ? jacobian[i * l + j] : jacobian[j * s + i]);
    for (; j < stride; ++j) row[j] = 0;
  }
  return exponent;
}

// Lane `lane` of the s x s Gram matrices: entries [i][j][lane].
inline void gram_lane(const double* rows, int64_t s, int64_t stride, double* gram, int lane) {
  for (int64_t i = 0; i < s; ++i) {
    const double* a = rows + i * stride;
    int64_t j = i;
    for (; j + 4 <= s; j += 4) {
      DoubleVector sum[4] = {};
      for (int64_t k = 0; k < stride; k += kDoubles) {
        const DoubleVector ak = load(a + k);
        LIPFAST_UNROLL
        for (int r = 0; r < 4; ++r) sum[r] += ak * load(rows + (j + r) * stride + k);
      }
      for (int r = 0; r < 4; ++r) {
        const double value = horizontal_sum<double>(sum[r]);
        gram[(i * s + j + r) * kDoubles + lane] = gram[((j + r) * s + i) * kDoubles + lane] = value;
      }
    }
    for (; j < s; ++j) {
      const double value = dot(a, rows + j * stride, stride);
      gram[(i * s + j) * kDoubles + lane] = gram[(j * s + i) * kDoubles + lane] = value;
    }
  }
}

template <class T>
void reduce_large(const T* jacobian, int64_t outputs, int64_t inputs, T* spectral, T* frobenius, double* work) {
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

// count <= kDoubles Jacobians, one after another in memory; spectral and frobenius: count values each.
template <class T>
void reduce(const T* jacobian, int64_t count, int64_t outputs, int64_t inputs, T* spectral, T* frobenius,
            double* work) {
  const int64_t s = smaller(outputs, inputs), size = outputs * inputs;
  if (s > kSmallSide) {
    for (int64_t i = 0; i < count; ++i)
      reduce_large(jacobian + i * size, outputs, inputs, spectral + i, frobenius + i, work);
    return;
  }
  const int64_t stride = round_up(larger(outputs, inputs), kDoubles);
  double* gram = work;
  double* scratch = gram + s * s * kDoubles;
  double* rows = scratch + 4 * s * kDoubles;
  memset(gram, 0, sizeof(double) * s * s * kDoubles);
  int exponents[kDoubles] = {};
  for (int64_t i = 0; i < count; ++i) {
    exponents[i] = widen_jacobian(jacobian + i * size, outputs, inputs, stride, rows);
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

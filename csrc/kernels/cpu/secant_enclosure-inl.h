// Values at several points with running error bounds (docs/bounds.md): activations as [unit][point], the points
// padded to whole vectors with zeros.
//
// Every line below that changes a bound says in which direction it rounds, or stands in docs/bounds.md.
#ifndef LIPFAST_SECANT_ENCLOSURE_INL_H
#define LIPFAST_SECANT_ENCLOSURE_INL_H

#include "secant_activation-inl.h"

constexpr double kUnderflow = 0x1p-1000;  // room for all roundings of one entry that underflow
constexpr int64_t kEvaluationRoundoffs = 32;
// Rows x vectors of accumulators, and the operands.
constexpr int kEnclosedRows = LIPFAST_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kEnclosedVectors = LIPFAST_VECTOR_BYTES == 64 ? 3 : 2;

// The error, or inf where the value is not finite (a partial sum may have overflowed) or the error is NaN.
LIPFAST_INLINE DoubleVector proved(DoubleVector value, DoubleVector error) {
  const auto known = (absolute(value) <= splat(DBL_MAX)) & (error == error);
  return known ? error : splat<double>(INFINITY);
}

// out[r][point] = shift[r] + sum over k of weight[r][k] from[k][point]: values from values, bounds from magnitudes. One
// after the other, since the operands of both together would not stay in the L1 cache.
struct RowsOfPoints {
  const double *weight, *shift;  // [row][cols], [row]
  int64_t cols;
  const double* from;
  double* out;
  int64_t stride;  // of a unit's points, whole vectors
};

template <int kRows, int kVectors>
void rows_of_points(const RowsOfPoints& p, int64_t at) {
  DoubleVector sum[kRows][kVectors];
  LIPFAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = splat(p.shift[r]);
  }
  const double* from = p.from + at;
  for (int64_t k = 0; k < p.cols; ++k, from += p.stride) {
    DoubleVector x[kVectors];
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) x[v] = load(from + v * kDoubles);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const DoubleVector w = splat(p.weight[r * p.cols + k]);
      LIPFAST_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] += w * x[v];
    }
  }
  store_tile(p.out + at, p.stride, sum);
}

// Up to kEnclosedRows rows.
inline void all_rows_of_points(int64_t rows, const RowsOfPoints& p) {
  with_constant<kEnclosedRows>(rows, [&]<int kRows>() {
    for (int64_t at = 0; at < p.stride; at += kEnclosedVectors * kDoubles) {
      with_constant<kEnclosedVectors>(smaller<int64_t>(kEnclosedVectors, (p.stride - at) / kDoubles),
                                      [&]<int kVectors>() { rows_of_points<kRows, kVectors>(p, at); });
    }
  });
}

// n numbers and their magnitudes, exactly.
template <class T>
LIPFAST_INLINE void widen(const T* from, int64_t n, double* to, double* magnitude) {
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) {
    const DoubleVector w = load_double(from + i);
    store(to + i, w);
    store(magnitude + i, absolute(w));
  }
  for (; i < n; ++i) {
    to[i] = static_cast<double>(from[i]);
    magnitude[i] = fabs(to[i]);
  }
}

// One thread's buffers: values and errors before and after a map, and rows of its weight.
struct EnclosureBuffers {
  double *value, *error, *next_value, *next_error, *weight, *magnitude;
  int64_t stride;
};

inline int64_t enclosure_size(const SecantChain& chain, int64_t points) {
  return 4 * chain.widest * round_up(points, kDoubles) + 2 * kEnclosedRows * chain.widest;
}

// The error e becomes |x| + e / gamma, which |W| turns into the bound of the map over gamma. 1 / gamma is rounded:
// docs/bounds.md counts it. e is 0 or at least 2^-1000, so the product does not underflow.
inline void errors_to_sizes(const double* value, double* error, int64_t n, double relative) {
  const double over = 1 / relative;
  for (int64_t i = 0; i < n; i += kDoubles) {
    store(error + i, absolute(load(value + i)) + load(error + i) * over);
  }
}

// The bounds over gamma become errors. gamma comes last: gamma |x| might underflow and then meet a huge weight.
inline void sums_to_errors(const double* value, double* error, int64_t n, double relative, double widened) {
  for (int64_t i = 0; i < n; i += kDoubles) {
    store(error + i, proved(load(value + i), load(error + i) * relative * widened + kUnderflow));
  }
}

template <class T>
void enclose_map(const SecantMap<T>& map, EnclosureBuffers& b) {
  const double relative = tight_gamma(map.cols + 2), widening = 1 + 2 * tight_gamma(map.cols + 8);
  errors_to_sizes(b.value, b.error, map.cols * b.stride, relative);
  double shift[kEnclosedRows] = {}, shift_magnitude[kEnclosedRows] = {};
  for (int64_t r = 0; r < map.rows; r += kEnclosedRows) {
    const int64_t rows = smaller<int64_t>(kEnclosedRows, map.rows - r);
    widen(map.weight + r * map.cols, rows * map.cols, b.weight, b.magnitude);
    if (map.bias != nullptr) widen(map.bias + r, rows, shift, shift_magnitude);
    all_rows_of_points(rows, {b.weight, shift, map.cols, b.value, b.next_value + r * b.stride, b.stride});
    all_rows_of_points(rows, {b.magnitude, shift_magnitude, map.cols, b.error, b.next_error + r * b.stride, b.stride});
  }
  sums_to_errors(b.next_value, b.next_error, map.rows * b.stride, relative, widening);
  exchange(b.value, b.next_value);
  exchange(b.error, b.next_error);
}

// As rules/pointwise.py: clipping is exact and passes errors on; LeakyReLU rounds.
inline void enclose_activation(const PiecewiseLinear& f, double* value, double* error, int64_t n) {
  const double steepest = larger(1.0, fabs(f.slope)), room = widening(8);
  const DoubleVector low = splat(f.low), high = splat(f.high);
  for (int64_t i = 0; i < n; i += kDoubles) {
    const DoubleVector v = load(value + i), e = load(error + i);
    DoubleVector out, bound;
    if (f.leaky) {
      out = v > 0 ? v : v * f.slope;
      const DoubleVector rounding = (absolute(v) + absolute(out)) * (kEvaluationRoundoffs * kUnitRoundoff);
      bound = (e * steepest + rounding) * room + kUnderflow;
    } else {
      const DoubleVector raised = v < low ? low : v;  // NaN stays
      out = raised > high ? high : raised;
      const DoubleVector most = (absolute(out) + f.limit) * room;  // |f(x)| + |z|, whatever x is
      bound = most < e ? most : e;
    }
    store(value + i, out);
    store(error + i, proved(out, bound));
  }
}

template <class T>
void enclose_of(const SecantChain& chain, int64_t network, const double* points, int64_t count, double* values,
                double* errors, double* workspace) {
  const int64_t stride = round_up(count, kDoubles), size = chain.widest * stride;
  double* rows = workspace + 4 * size;
  EnclosureBuffers b{workspace,
                     workspace + size,
                     workspace + 2 * size,
                     workspace + 3 * size,
                     rows,
                     rows + kEnclosedRows * chain.widest,
                     stride};
  memset(b.error, 0, sizeof(double) * static_cast<size_t>(chain.inputs * stride));
  for (int64_t i = 0; i < chain.inputs; ++i) {
    for (int64_t p = 0; p < stride; ++p) b.value[i * stride + p] = p < count ? points[p * chain.inputs + i] : 0.0;
  }
  for (int64_t s = 0; s < chain.count; ++s) {
    const SecantStage& stage = chain.stages[s];
    if (stage.linear) {
      enclose_map(map_of<T>(chain, network, stage), b);
    } else {
      enclose_activation(piecewise_linear(stage), b.value, b.error, stage.in * stride);
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t k = 0; k < chain.outputs; ++k) {
      values[p * chain.outputs + k] = b.value[k * stride + p];
      errors[p * chain.outputs + k] = b.error[k * stride + p];
    }
  }
}

#endif

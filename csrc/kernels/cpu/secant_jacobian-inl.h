// The Jacobian at one sample: forward with the activations' derivatives, then the K rows back through the maps over
// lists of the units whose derivative is not zero. Weights are read row by row, as torch has them.
#ifndef LIPFAST_SECANT_JACOBIAN_INL_H
#define LIPFAST_SECANT_JACOBIAN_INL_H

#include "secant_activation-inl.h"
#include "secant_line-inl.h"

constexpr int kJacobianRows = LIPFAST_VECTOR_BYTES == 64 ? 12 : 5;  // rows x 2 accumulators, 2 + 1 operands

// One thread's buffers. factors: derivatives of what follows each map, the inputs' first, one after another.
struct JacobianBuffers {
  double *values, *factors, *rows, *next, *terms;
  int64_t* units;
};

inline int64_t count_factors(const SecantChain& chain) {
  int64_t count = chain.inputs;
  for (int64_t s = 0; s < chain.count; ++s) count += chain.stages[s].linear ? chain.stages[s].out : 0;
  return count;
}

inline int64_t jacobian_size(const SecantChain& chain) {
  return 3 * chain.widest + count_factors(chain) + 3 * chain.outputs * chain.widest;
}

inline JacobianBuffers place_jacobian(const SecantChain& chain, double* workspace) {
  const int64_t product = chain.outputs * chain.widest;
  JacobianBuffers b;
  b.values = workspace;
  b.rows = b.values + 2 * chain.widest;
  b.next = b.rows + product;
  b.terms = b.next + product;
  b.units = reinterpret_cast<int64_t*>(b.terms + product);
  b.factors = b.terms + product + chain.widest;
  return b;
}

// Fills the factors; every map's begin where the one's before end.
template <class T>
void forward_factors(const SecantChain& chain, int64_t network, const double* x, const JacobianBuffers& b) {
  double *from = b.values, *to = b.values + chain.widest, *factors = b.factors;
  memcpy(from, x, sizeof(double) * static_cast<size_t>(chain.inputs));
  for (int64_t i = 0; i < chain.inputs; ++i) factors[i] = 1;
  for (int64_t s = 0; s < chain.count; ++s) {
    const SecantStage& stage = chain.stages[s];
    if (stage.linear) {
      map_sides<T, 1>(map_of<T>(chain, network, stage), from, to, 0);
      exchange(from, to);
      factors += stage.in;
      for (int64_t i = 0; i < stage.out; ++i) factors[i] = 1;
      continue;
    }
    const PiecewiseLinear f = piecewise_linear(stage);
    for (int64_t i = 0; i < stage.in; ++i) {
      factors[i] *= f.derivative(from[i]);
      from[i] = f.value(from[i]);
    }
  }
}

// The terms of a product with W: the units that count, and what multiplies their rows of W.
struct UnitTerms {
  const double* factors;  // [term][outputs]
  const int64_t* units;
  int64_t count, outputs;
};

// out[r][0 .. kVectors * kDoubles) = sum over the terms of factor times W's row, from a column on, for kRows rows.
template <class T, int kRows, int kVectors>
void rows_times_weight(const UnitTerms& terms, int64_t first, const T* weight, int64_t cols, double* out,
                       int64_t out_stride) {
  DoubleVector sum[kRows][kVectors] = {};
  const double* factors = terms.factors + first;
  for (int64_t a = 0; a < terms.count; ++a, factors += terms.outputs) {
    const T* row = weight + terms.units[a] * cols;
    DoubleVector w[kVectors];
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load_double(row + v * kDoubles);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const DoubleVector factor = splat(factors[r]);
      LIPFAST_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * w[v];
    }
  }
  store_tile(out, out_stride, sum);
}

// A panel of columns for all rows, in tiles of equal height.
template <class T, int kVectors>
void panel_of_jacobian(const UnitTerms& terms, const T* weight, int64_t cols, double* out, int64_t out_stride) {
  for_tiles<kJacobianRows>(terms.outputs, [&]<int kRows>(int64_t r) {
    rows_times_weight<T, kRows, kVectors>(terms, r, weight, cols, out + r * out_stride, out_stride);
  });
}

// out (outputs, cols). The last panel ends where the rows of W end: it computes some columns a second time, alike.
template <class T>
void terms_times_weight(const UnitTerms& terms, const T* weight, int64_t cols, double* out, int64_t out_stride) {
  constexpr int64_t kWidth = 2 * kDoubles;
  if (cols >= kWidth) {
    for (int64_t i = 0; i < cols; i += kWidth) {
      const int64_t at = smaller(i, cols - kWidth);
      panel_of_jacobian<T, 2>(terms, weight + at, cols, out + at, out_stride);
    }
  } else if (cols >= kDoubles) {
    for (int64_t i = 0; i < cols; i += kDoubles) {
      const int64_t at = smaller<int64_t>(i, cols - kDoubles);
      panel_of_jacobian<T, 1>(terms, weight + at, cols, out + at, out_stride);
    }
  } else {
    for (int64_t k = 0; k < terms.outputs; ++k) {
      for (int64_t i = 0; i < cols; ++i) {
        double sum = 0;
        for (int64_t a = 0; a < terms.count; ++a) {
          sum += terms.factors[a * terms.outputs + k] * static_cast<double>(weight[terms.units[a] * cols + i]);
        }
        out[k * out_stride + i] = sum;
      }
    }
  }
}

template <class T>
void jacobian_of(const SecantChain& chain, int64_t network, const double* x, double* jacobian, double* workspace) {
  JacobianBuffers b = place_jacobian(chain, workspace);
  forward_factors<T>(chain, network, x, b);
  const int64_t outputs = chain.outputs, stride = chain.widest;
  const double* factors = b.factors + count_factors(chain) - outputs;
  bool last = true;
  for (int64_t s = chain.count - 1; s >= 0; --s) {
    const SecantStage& stage = chain.stages[s];
    if (!stage.linear) continue;
    const SecantMap<T> map = map_of<T>(chain, network, stage);
    if (last) {
      for (int64_t k = 0; k < outputs; ++k) {
        for (int64_t i = 0; i < map.cols; ++i) {
          b.rows[k * stride + i] = factors[k] * static_cast<double>(map.weight[k * map.cols + i]);
        }
      }
      last = false;
    } else {
      UnitTerms terms{b.terms, b.units, 0, outputs};
      for (int64_t j = 0; j < map.rows; ++j) {
        if (factors[j] == 0) continue;
        for (int64_t k = 0; k < outputs; ++k) {
          b.terms[terms.count * outputs + k] = factors[j] * b.rows[k * stride + j];
        }
        b.units[terms.count++] = j;
      }
      terms_times_weight(terms, map.weight, map.cols, b.next, stride);
      exchange(b.rows, b.next);
    }
    factors -= map.cols;
  }
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t i = 0; i < chain.inputs; ++i) jacobian[k * chain.inputs + i] = b.rows[k * stride + i] * factors[i];
  }
}

#endif

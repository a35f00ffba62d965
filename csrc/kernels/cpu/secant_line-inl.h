// A sample, alone or with a direction, through the chain: products of W with one or two vectors; and the kinks that
// the line meets.
#ifndef LIPFAST_SECANT_LINE_INL_H
#define LIPFAST_SECANT_LINE_INL_H

#include "secant_activation-inl.h"

constexpr int kLineSums = 8;  // accumulators: rows x sides, whole vectors of sums

// to[side][r] = W[r] . from[side] for kLineSums / kSides rows.
template <class T, int kSides>
void rows_times_sides(const T* weight, int64_t cols, const double* from, double* to, int64_t stride) {
  constexpr int kRows = kLineSums / kSides;
  DoubleVector sums[kLineSums] = {};
  int64_t k = 0;
  for (; k + kDoubles <= cols; k += kDoubles) {
    DoubleVector x[kSides];
    LIPFAST_UNROLL
    for (int s = 0; s < kSides; ++s) x[s] = load(from + s * stride + k);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const DoubleVector w = load_double(weight + r * cols + k);
      LIPFAST_UNROLL
      for (int s = 0; s < kSides; ++s) sums[s * kRows + r] += w * x[s];
    }
  }
  double totals[kLineSums];
  LIPFAST_UNROLL
  for (int i = 0; i < kLineSums; i += kDoubles) store(totals + i, lane_sums<double>(sums + i));
  for (int s = 0; s < kSides; ++s) {
    for (int r = 0; r < kRows; ++r) {
      double total = totals[s * kRows + r];
      for (int64_t i = k; i < cols; ++i) total += static_cast<double>(weight[r * cols + i]) * from[s * stride + i];
      to[s * stride + r] = total;
    }
  }
}

template <class T>
double row_times_side(const T* row, int64_t cols, const double* from) {
  DoubleVector sum{};
  int64_t k = 0;
  for (; k + kDoubles <= cols; k += kDoubles) sum += load_double(row + k) * load(from + k);
  double total = horizontal_sum<double>(sum);
  for (; k < cols; ++k) total += static_cast<double>(row[k]) * from[k];
  return total;
}

// Side 0 is a point and gets the bias, side 1 a direction.
template <class T, int kSides>
void map_sides(const SecantMap<T>& map, const double* from, double* to, int64_t stride) {
  constexpr int kRows = kLineSums / kSides;
  int64_t r = 0;
  for (; r + kRows <= map.rows; r += kRows) {
    rows_times_sides<T, kSides>(map.weight + r * map.cols, map.cols, from, to + r, stride);
  }
  for (; r < map.rows; ++r) {
    for (int s = 0; s < kSides; ++s) {
      to[s * stride + r] = row_times_side(map.weight + r * map.cols, map.cols, from + s * stride);
    }
  }
  if (map.bias == nullptr) return;
  for (int64_t i = 0; i < map.rows; ++i) to[i] += static_cast<double>(map.bias[i]);
}

inline int64_t line_size(const SecantChain& chain) { return 4 * chain.widest; }

// The nearest kinks of n units in either direction; 0 / 0 and c / 0 are not distances, and NaN is none.
inline void meet_kinks(double kink, const double* value, const double* slope, int64_t n, double reach[2]) {
  double backward = reach[0], forward = reach[1];
  for (int64_t i = 0; i < n; ++i) {
    const double distance = slope[i] != 0 ? (kink - value[i]) / slope[i] : INFINITY;
    backward = (distance < 0) & (-distance < backward) ? -distance : backward;
    forward = (distance > 0) & (distance < forward) ? distance : forward;
  }
  reach[0] = backward;
  reach[1] = forward;
}

template <class T>
void kinks_of(const SecantChain& chain, int64_t network, const double* x, const double* d, double reach[2],
              double* workspace) {
  const int64_t stride = chain.widest;
  double *from = workspace, *to = workspace + 2 * stride;
  memcpy(from, x, sizeof(double) * static_cast<size_t>(chain.inputs));
  memcpy(from + stride, d, sizeof(double) * static_cast<size_t>(chain.inputs));
  reach[0] = reach[1] = INFINITY;
  for (int64_t s = 0; s < chain.count; ++s) {
    const SecantStage& stage = chain.stages[s];
    if (stage.linear) {
      map_sides<T, 2>(map_of<T>(chain, network, stage), from, to, stride);
      exchange(from, to);
      continue;
    }
    const PiecewiseLinear f = piecewise_linear(stage);
    double *value = from, *slope = from + stride;
    meet_kinks(f.low, value, slope, stage.in, reach);
    if (f.high < INFINITY) meet_kinks(f.high, value, slope, stage.in, reach);
    for (int64_t i = 0; i < stage.in; ++i) {
      slope[i] *= f.derivative(value[i]);
      value[i] = f.value(value[i]);
    }
  }
}

#endif

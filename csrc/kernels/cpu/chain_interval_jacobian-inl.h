// Body of chain_interval_jacobian, once per instruction set. All of it is proof: docs/bounds.md, "Norms 1 and inf".
#ifndef LIPFAST_CHAIN_INTERVAL_JACOBIAN_INL_H
#define LIPFAST_CHAIN_INTERVAL_JACOBIAN_INL_H

#include "vector-inl.h"

// What underflows, of one entry, and what a weight makes of it.
constexpr double kIntervalUnderflow = 0x1p-1000;
constexpr double kHullRoundoff = 8 * kUnitRoundoff;
constexpr int64_t kInnerBlock = 64;  // rows of a weight at a time: their tile stays in the nearest cache

// Rows of a Jacobian as balls.
struct Balls {
  double *middle, *radius;
};

// [middle -+ radius] times any slope between low and high.
template <class V>
LIPFAST_INLINE void take_slopes(V& middle, V& radius, V low, V high) {
  const V least = middle - radius, most = middle + radius;
  const V ends[4] = {low * least, low * most, high * least, high * most};
  V below = ends[0], above = ends[0];
  LIPFAST_UNROLL
  for (int i = 1; i < 4; ++i) {
    below = ends[i] < below ? ends[i] : below;
    above = ends[i] > above ? ends[i] : above;
  }
  const V one = absolute(below), other = absolute(above);
  const V size = one > other ? one : other;
  middle = (below + above) * 0.5;
  radius = ((above - below) * 0.5 + size * kHullRoundoff) + kIntervalUnderflow;
}

// Returns 0, or NaN where an entry is not finite.
inline double take_slopes(const Balls& balls, const double* low, const double* high, int64_t n) {
  DoubleVector lost{};
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) {
    DoubleVector middle = load(balls.middle + i), radius = load(balls.radius + i);
    lost += (middle - middle) + (radius - radius);
    take_slopes(middle, radius, load(low + i), load(high + i));
    store(balls.middle + i, middle);
    store(balls.radius + i, radius);
  }
  double rest = horizontal_sum<double>(lost);
  for (; i < n; ++i) {
    rest += (balls.middle[i] - balls.middle[i]) + (balls.radius[i] - balls.radius[i]);
    take_slopes(balls.middle[i], balls.radius[i], low[i], high[i]);
  }
  return rest;
}

template <int kRows, int kVectors>
struct IntervalTile {
  DoubleVector middle[kRows][kVectors], radius[kRows][kVectors];
};

// Adds `depth` rows of a weight, times middles and radii, to kRows rows of kVectors vectors of results.
template <int kRows, int kVectors, class T>
LIPFAST_INLINE void add_tile(const Balls& from, int64_t from_step, const T* weight, const double* error,
                             const double* sizes, int64_t columns, int64_t depth, const Balls& to) {
  IntervalTile<kRows, kVectors> tile;
  load_tile(to.middle, columns, tile.middle);
  load_tile(to.radius, columns, tile.radius);
  for (int64_t i = 0; i < depth; ++i) {
    DoubleVector w[kVectors];
    LIPFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load_double(weight + i * columns + v * kDoubles);
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const DoubleVector middle = splat(from.middle[r * from_step + i]), radius = splat(from.radius[r * from_step + i]);
      LIPFAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        tile.middle[r][v] += middle * w[v];
        tile.radius[r][v] += radius * absolute(w[v]);
      }
    }
    if (error == nullptr) continue;
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      LIPFAST_UNROLL
      for (int v = 0; v < kVectors; ++v)
        tile.radius[r][v] += sizes[r * from_step + i] * load(error + i * columns + v * kDoubles);
    }
  }
  store_tile(to.middle, columns, tile.middle);
  store_tile(to.radius, columns, tile.radius);
}

template <class T>
struct IntervalProduct {
  const IntervalMap& map;
  Balls from;
  const double* sizes;  // |middle| + radius, if the weight has errors
  int64_t rows;
  Balls to;

  // Columns from `column` on in tiles of kVectors vectors; returns the first that is left.
  template <int kVectors>
  LIPFAST_INLINE int64_t tiles(int64_t inner, int64_t depth, int64_t column) const {
    const int64_t n = map.rows, m = map.columns;
    const T* weight = static_cast<const T*>(map.weight) + inner * m;
    const double* error = map.error == nullptr ? nullptr : map.error + inner * m;
    for (; column + kVectors * kDoubles <= m; column += kVectors * kDoubles) {
      const double* wrong = error == nullptr ? nullptr : error + column;
      for_tiles<2>(rows, [&]<int kRows>(int64_t r) {
        const int64_t at = r * n + inner;
        add_tile<kRows, kVectors>({from.middle + at, from.radius + at}, n, weight + column, wrong, sizes + at, m, depth,
                                  {to.middle + r * m + column, to.radius + r * m + column});
      });
    }
    return column;
  }

  void rest(int64_t inner, int64_t depth, int64_t column) const {
    const int64_t n = map.rows, m = map.columns;
    const T* weight = static_cast<const T*>(map.weight);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = column; k < m; ++k) {
        double middle = to.middle[r * m + k], radius = to.radius[r * m + k];
        for (int64_t i = inner; i < inner + depth; ++i) {
          const double w = static_cast<double>(weight[i * m + k]);
          middle += from.middle[r * n + i] * w;
          radius += from.radius[r * n + i] * fabs(w);
          if (map.error != nullptr) radius += sizes[r * n + i] * map.error[i * m + k];
        }
        to.middle[r * m + k] = middle;
        to.radius[r * m + k] = radius;
      }
    }
  }

  void run() const {
    const int64_t n = map.rows, entries = rows * map.columns;
    memset(to.middle, 0, sizeof(double) * static_cast<size_t>(entries));
    memset(to.radius, 0, sizeof(double) * static_cast<size_t>(entries));
    for (int64_t inner = 0; inner < n; inner += kInnerBlock) {
      const int64_t depth = smaller(kInnerBlock, n - inner);
      rest(inner, depth, tiles<1>(inner, depth, tiles<2>(inner, depth, 0)));
    }
    const double factor = 1 + 2 * gamma(2 * n + 8);
    for (int64_t i = 0; i < entries; ++i) to.radius[i] = to.radius[i] * factor + kIntervalUnderflow;
  }
};

// to = from W, for all W within the error of the stored one; the radii of `from` are overwritten.
inline void multiply(const IntervalMap& map, const Balls& from, int64_t rows, double* sizes, const Balls& to) {
  const double share = gamma(map.rows + 4);
  for (int64_t i = 0; i < rows * map.rows; ++i) {
    const double size = fabs(from.middle[i]);
    sizes[i] = size + from.radius[i];
    from.radius[i] += share * size;
  }
  if (map.dtype == Dtype::kFloat32) {
    IntervalProduct<float>{map, from, sizes, rows, to}.run();
  } else {
    IntervalProduct<double>{map, from, sizes, rows, to}.run();
  }
}

// Rows of the last map, or unit vectors before the slopes behind it.
inline void begin(const IntervalMap& map, int64_t first, int64_t rows, bool units, const Balls& to) {
  const int64_t n = units ? map.rows : map.columns;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (first + r) * n + i;
      double &middle = to.middle[r * n + i], &radius = to.radius[r * n + i];
      radius = kIntervalUnderflow;  // so that no radius is denormal, nor what is added to it lost
      if (units) {
        middle = i == first + r ? 1 : 0;
        continue;
      }
      middle = map.dtype == Dtype::kFloat32 ? static_cast<double>(static_cast<const float*>(map.weight)[at])
                                            : static_cast<const double*>(map.weight)[at];
      if (map.error != nullptr) radius += map.error[at] * widening(4);
    }
  }
}

inline int64_t interval_jacobian_workspace(const IntervalChain& chain) {
  return 5 * kIntervalRows * chain.widest * static_cast<int64_t>(sizeof(double));
}

inline void interval_jacobian_rows(const IntervalChain& chain, int64_t first, int64_t rows, bool by_columns,
                                   double* sums, double* work) {
  const int64_t size = kIntervalRows * chain.widest;
  Balls now{work, work + size}, next{work + 2 * size, work + 3 * size};
  double* sizes = work + 4 * size;
  double lost = 0;
  const auto with_slopes = [&](const double* low, const double* high, int64_t n) {
    if (low == nullptr) return;
    for (int64_t r = 0; r < rows; ++r) lost += take_slopes({now.middle + r * n, now.radius + r * n}, low, high, n);
  };
  int64_t i = chain.count - 1;
  const bool units = chain.maps[i].low != nullptr;
  begin(chain.maps[i], first, rows, units, now);
  if (!units) --i;
  for (; i >= 0; --i) {
    const IntervalMap& map = chain.maps[i];
    with_slopes(map.low, map.high, map.rows);
    multiply(map, now, rows, sizes, next);
    exchange(now, next);
  }
  const int64_t inputs = chain.maps[0].columns;
  with_slopes(chain.low, chain.high, inputs);

  if (by_columns) memset(sums, 0, sizeof(double) * static_cast<size_t>(inputs));
  double largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t k = 0; k < inputs; ++k) {
      const double entry = fabs(now.middle[r * inputs + k]) + now.radius[r * inputs + k];
      sum += entry;
      if (by_columns) sums[k] += entry;
    }
    lost += sum - sum;
    largest = larger(largest, sum * (1 + 2 * gamma(inputs + 4)));
  }
  if (!by_columns) sums[0] = largest;
  if (lost != 0) sums[0] = INFINITY;
}

template <class T>
double largest_sum_of(const T* weight, int64_t rows, int64_t columns, bool by_columns, double* sums) {
  double largest = 0, lost = 0;
  if (by_columns) memset(sums, 0, sizeof(double) * static_cast<size_t>(columns));
  for (int64_t r = 0; r < rows; ++r, weight += columns) {
    DoubleVector row{};
    int64_t i = 0;
    for (; i + kDoubles <= columns; i += kDoubles) {
      const DoubleVector size = absolute(load_double(weight + i));
      if (by_columns) {
        store(sums + i, load(sums + i) + size);
      } else {
        row += size;
      }
    }
    double sum = horizontal_sum<double>(row);
    for (; i < columns; ++i) {
      const double size = fabs(static_cast<double>(weight[i]));
      (by_columns ? sums[i] : sum) += size;
    }
    largest = larger(largest, sum);
    lost += sum;
  }
  for (int64_t i = 0; by_columns && i < columns; ++i) {
    largest = larger(largest, sums[i]);
    lost += sums[i];
  }
  return lost == lost ? largest : NAN;
}

inline double interval_largest_sum(const IntervalMap& map, bool by_columns, double* work) {
  if (map.dtype == Dtype::kFloat32)
    return largest_sum_of(static_cast<const float*>(map.weight), map.rows, map.columns, by_columns, work);
  return largest_sum_of(static_cast<const double*>(map.weight), map.rows, map.columns, by_columns, work);
}

inline ChainIntervalJacobianKernel interval_jacobian_kernel() {
  return {interval_jacobian_workspace, interval_jacobian_rows, interval_largest_sum};
}

#endif

// A sample, alone or with a direction, through the chain: products of W with one or two vectors; and the kinks that
// the line meets.

// to[side][r] = W[r] . from[side] for kRows rows.
template <class T, int kRows, int kSides>
void rows_times_sides(const T* weight, int64_t cols, const double* from, int64_t from_stride, double* to,
                      int64_t to_stride) {
  DoubleVector sum[kRows][kSides] = {};
  int64_t k = 0;
  for (; k + kDoubles <= cols; k += kDoubles) {
    LIPFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const DoubleVector w = load_double(weight + r * cols + k);
      LIPFAST_UNROLL
      for (int s = 0; s < kSides; ++s) sum[r][s] += w * load(from + s * from_stride + k);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kSides; ++s) {
      double total = horizontal_sum<double>(sum[r][s]);
      for (int64_t i = k; i < cols; ++i) total += static_cast<double>(weight[r * cols + i]) * from[s * from_stride + i];
      to[s * to_stride + r] = total;
    }
  }
}

// Side 0 is a point and gets the bias, side 1 a direction.
template <class T, int kSides>
void map_sides(const SecantMap<T>& map, const double* from, double* to, int64_t stride) {
  constexpr int kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= map.rows; r += kRows) {
    rows_times_sides<T, kRows, kSides>(map.weight + r * map.cols, map.cols, from, stride, to + r, stride);
  }
  for (; r < map.rows; ++r) {
    rows_times_sides<T, 1, kSides>(map.weight + r * map.cols, map.cols, from, stride, to + r, stride);
  }
  if (map.bias == nullptr) return;
  for (int64_t i = 0; i < map.rows; ++i) to[i] += static_cast<double>(map.bias[i]);
}

inline int64_t line_size(const SecantChain& chain) { return 4 * chain.widest; }

// The nearest kinks of n units in either direction; 0 / 0 and c / 0 are not distances, and NaN is none.
inline void meet_kinks(double kink, const double* value, const double* slope, int64_t n, double reach[2]) {
  for (int64_t i = 0; i < n; ++i) {
    const double distance = slope[i] != 0 ? (kink - value[i]) / slope[i] : INFINITY;
    reach[0] = distance < 0 && -distance < reach[0] ? -distance : reach[0];
    reach[1] = distance > 0 && distance < reach[1] ? distance : reach[1];
  }
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
      double* before = from;
      from = to;
      to = before;
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

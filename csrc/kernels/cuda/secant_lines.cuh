// Points on the line through a sample of each network along which its Jacobian stretches most. No part of a proof.
#pragma once

#include "secant_chain.cuh"

namespace lipfast::cuda {

constexpr int kSquarings = 30;  // of the Gram matrix: singular values 1e-8 apart are told apart

// A block's buffers. It lies in shared memory, so that registers hold of it what is in use.
struct LineBuffers {
  double *from, *to;         // [widest]
  double *values, *factors;  // of the inputs, then of each layer's units: what the activations meet, their derivatives
  double *rows, *next;       // [unit][LinesLayout::rows]: the Jacobian of what follows, transposed
  double *gram, *square;     // [side][side]
  double scratch[kMaxWarps];
};

// Ends with a barrier.
__device__ inline void place_lines(const LinesLayout& layout, double* workspace, LineBuffers& b) {
  if (thread() == 0) {
    b.from = workspace + blockIdx.x * layout.doubles();
    b.to = b.from + layout.widest;
    b.values = b.to + layout.widest;
    b.factors = b.values + layout.units;
    b.rows = b.factors + layout.units;
    b.next = b.rows + layout.rows * layout.widest;
    b.gram = b.next + layout.rows * layout.widest;
    b.square = b.gram + layout.side * layout.side;
  }
  __syncthreads();
}

// to = W from, a warp per row.
template <class T>
__device__ double row_times(const SecantMap<T>& map, int r, const double* from) {
  const T* row = map.weight + int64_t{r} * map.cols;
  double sum = 0;
  for (int i = lane(); i < map.cols; i += kWarp) sum += static_cast<double>(row[i]) * from[i];
  return warp_sum(sum);
}

// What activation l's chain of functions makes of v; sets its derivative.
__device__ inline double activate_unit(const SecantChains& chains, int l, double v, double& derivative) {
  derivative = 1;
  for (int a = chains.starts[l]; a < chains.starts[l + 1]; ++a) {
    derivative *= derivative_of(chains.activations[a], v);
    v = value_of(chains.activations[a], v);
  }
  return v;
}

// Fills values and factors. Ends with a barrier.
template <class T>
LIPFAST_PHASE void forward_line(const SecantChains& chains, int64_t network, const double* x, LineBuffers& b) {
  const int inputs = chains.widths[0];
  for (int64_t i = thread(); i < inputs; i += threads()) {
    b.values[i] = x[i];
    b.from[i] = activate_unit(chains, 0, x[i], b.factors[i]);
  }
  __syncthreads();
  double *from = b.from, *to = b.to;
  int64_t at = inputs;
  for (int l = 0; l < chains.layers; ++l) {
    const SecantMap<T> map = map_of<T>(chains, network, l);
    for (int r = warp(); r < map.rows; r += warps()) {
      const double shift = map.bias != nullptr ? static_cast<double>(map.bias[r]) : 0.0;
      const double v = row_times(map, r, from) + shift;
      if (lane() == 0) {
        b.values[at + r] = v;
        to[r] = activate_unit(chains, l + 1, v, b.factors[at + r]);
      }
    }
    __syncthreads();
    at += map.rows;
    double* swap = from;
    from = to;
    to = swap;
  }
}

// next[i][k] = sum over units j of rows[j][k] factors[j] W[j][i]: a column of W per thread, active units only.
template <class T>
__device__ void multiply_rows(const SecantMap<T>& map, const double* factors, const double* rows, int64_t stride,
                              double* next) {
  for (int64_t i = thread(); i < map.cols; i += threads()) {
    for (int64_t first = 0; first < stride; first += kSecantRows) {
      double sums[kSecantRows] = {};
      for (int j = 0; j < map.rows; ++j) {
        const double factor = factors[j];
        if (factor == 0) continue;
        const double w = factor * static_cast<double>(map.weight[int64_t{j} * map.cols + i]);
        const double* row = rows + j * stride + first;
#pragma unroll
        for (int k = 0; k < kSecantRows; ++k) sums[k] += row[k] * w;
      }
#pragma unroll
      for (int k = 0; k < kSecantRows; ++k) next[i * stride + first + k] = sums[k];
    }
  }
}

// The Jacobian, transposed: (inputs, rows), zeros beyond the outputs. Ends with a barrier.
template <class T>
LIPFAST_PHASE double* backward_line(const SecantChains& chains, int64_t network, const LinesLayout& layout,
                                    LineBuffers& b) {
  double *rows = b.rows, *next = b.next;
  const int64_t stride = layout.rows;
  const double* factors = b.factors + layout.units;
  for (int l = chains.layers - 1; l >= 0; --l) {
    const SecantMap<T> map = map_of<T>(chains, network, l);
    factors -= map.rows;
    if (l == chains.layers - 1) {
      for (int64_t at = thread(); at < map.cols * stride; at += threads()) {
        const int64_t i = at / stride, k = at % stride;
        rows[at] = k < map.rows ? factors[k] * static_cast<double>(map.weight[k * map.cols + i]) : 0.0;
      }
    } else {
      multiply_rows(map, factors, rows, stride, next);
      double* swap = rows;
      rows = next;
      next = swap;
    }
    __syncthreads();
  }
  for (int64_t at = thread(); at < layout.rows * chains.widths[0]; at += threads()) rows[at] *= b.factors[at / stride];
  __syncthreads();
  return rows;
}

// The position of the largest value of a thread's own (value, position) pairs over the block, the same in all threads.
__device__ inline int64_t block_first_of_largest(Ranked own, double* scratch) {
  const double top = block_max(own.value, scratch);
  const double position = own.value == top ? static_cast<double>(own.position) : INFINITY;
  return static_cast<int64_t>(-block_max(-position, scratch));
}

__device__ inline double finite_or_zero(double value) { return fabs(value) < INFINITY ? value : 0.0; }

// The largest column (norm 1) or row (norm inf) of a Jacobian, by the sum of magnitudes.
LIPFAST_PHASE inline int64_t largest_line(const double* jacobian, int64_t stride, int64_t inputs, int64_t outputs,
                                          bool columns, double* scratch) {
  Ranked best{-1, 0};
  for (int64_t at = thread(); at < (columns ? inputs : outputs); at += threads()) {
    double sum = 0;
    for (int64_t other = 0; other < (columns ? outputs : inputs); ++other) {
      sum += fabs(finite_or_zero(jacobian[columns ? at * stride + other : other * stride + at]));
    }
    if (before({sum, at}, best)) best = {sum, at};
  }
  return block_first_of_largest(best, scratch);
}

// gram^(2^kSquarings) up to a factor, which has the top eigenvector in its columns. Returns the matrix of `gram` and
// `square` that holds it. Ends with a barrier.
__device__ inline double* squared_often(double* gram, double* square, int64_t side, double* scratch) {
  for (int turn = 0; turn < kSquarings; ++turn) {
    double own = 0;
    for (int64_t i = thread(); i < side; i += threads()) own += gram[i * side + i];
    const double trace = block_sum(own, scratch), scale = trace > 0 ? 1 / trace : 0.0;
    for (int64_t at = thread(); at < side * side; at += threads()) {
      const double *row = gram + at / side * side, *column = gram + at % side * side;  // symmetric
      double sum = 0;
      for (int64_t k = 0; k < side; ++k) sum += row[k] * scale * (column[k] * scale);
      square[at] = sum;
    }
    __syncthreads();
    double* swap = gram;
    gram = square;
    square = swap;
  }
  return gram;
}

// direction = the top right singular vector of a Jacobian, up to its length; jacobian is scaled on the way.
LIPFAST_PHASE inline void singular_direction(double* jacobian, const LinesLayout& layout, int64_t inputs,
                                             int64_t outputs, LineBuffers& b, double* direction) {
  const int64_t stride = layout.rows, side = layout.side;
  double peak = 0;
  for (int64_t at = thread(); at < inputs * stride; at += threads()) {
    peak = larger(peak, fabs(finite_or_zero(jacobian[at])));
  }
  peak = block_max(peak, b.scratch);
  for (int64_t at = thread(); at < inputs * stride; at += threads()) {
    jacobian[at] = finite_or_zero(jacobian[at]) / (peak > 0 ? peak : 1.0);
  }
  __syncthreads();
  const bool by_rows = outputs <= inputs;
  // Entries of a row of the factor are `along` apart, rows `across`.
  const int64_t along = by_rows ? stride : 1, across = by_rows ? 1 : stride, length = by_rows ? inputs : outputs;
  for (int64_t at = thread(); at < side * side; at += threads()) {
    const double *row = jacobian + at / side * across, *other = jacobian + at % side * across;
    double sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += row[k * along] * other[k * along];
    b.gram[at] = sum;
  }
  __syncthreads();
  const double* top = squared_often(b.gram, b.square, side, b.scratch);
  Ranked best{-1, 0};
  for (int64_t i = thread(); i < side; i += threads()) {
    if (before({top[i * side + i], i}, best)) best = {top[i * side + i], i};
  }
  const double* vector = top + block_first_of_largest(best, b.scratch) * side;
  for (int64_t i = thread(); i < inputs; i += threads()) {
    double sum = by_rows ? 0.0 : vector[i];
    for (int64_t k = 0; by_rows && k < outputs; ++k) sum += jacobian[i * stride + k] * vector[k];
    direction[i] = sum;
  }
}

// direction: of length 1 in the norm 2, or what stretches most in the others. A thread writes the entries that it alone
// reads later.
__device__ inline void steepest_direction(const SecantChains& chains, const LinesLayout& layout, double* jacobian,
                                          LineBuffers& b, double* direction) {
  const int64_t inputs = chains.widths[0], outputs = chains.widths[chains.layers], stride = layout.rows;
  if (chains.norm != 2) {
    const int64_t line = largest_line(jacobian, stride, inputs, outputs, chains.norm == 1, b.scratch);
    for (int64_t i = thread(); i < inputs; i += threads()) {
      direction[i] = chains.norm == 1 ? (i == line ? 1.0 : 0.0) : jacobian[i * stride + line] < 0 ? -1.0 : 1.0;
    }
    return;
  }
  singular_direction(jacobian, layout, inputs, outputs, b, direction);
  double squares = 0;
  for (int64_t i = thread(); i < inputs; i += threads()) squares += direction[i] * direction[i];
  const double length = sqrt(block_sum(squares, b.scratch));
  for (int64_t i = thread(); i < inputs; i += threads()) {
    direction[i] = length > 0 ? direction[i] / length : i == 0 ? 1.0 : 0.0;
  }
}

// How far the sample may go down and up before a unit meets a kink.
struct Reach {
  double down = INFINITY, up = INFINITY;

  // 0 / 0 and c / 0 are not distances, and NaN is none.
  __device__ void meet(double kink, double value, double slope) {
    const double distance = slope != 0 ? (kink - value) / slope : INFINITY;
    if (distance < 0 && -distance < down) down = -distance;
    if (distance > 0 && distance < up) up = distance;
  }
};

// The slope of a unit behind the activations after layer l - 1; what they meet on the way goes to `reach`.
__device__ inline double pass_kinks(const SecantChains& chains, int l, double value, double slope, Reach& reach) {
  for (int a = chains.starts[l]; a < chains.starts[l + 1]; ++a) {
    const PiecewiseLinear& f = chains.activations[a];
    reach.meet(f.low, value, slope);
    if (f.high < INFINITY) reach.meet(f.high, value, slope);
    slope *= derivative_of(f, value);
    value = value_of(f, value);
  }
  return slope;
}

// The same in all threads.
template <class T>
LIPFAST_PHASE Reach reach_of(const SecantChains& chains, int64_t network, const double* direction, LineBuffers& b) {
  Reach reach;
  const int inputs = chains.widths[0];
  double *from = b.from, *to = b.to;
  for (int64_t i = thread(); i < inputs; i += threads())
    from[i] = pass_kinks(chains, 0, b.values[i], direction[i], reach);
  __syncthreads();
  int64_t at = inputs;
  for (int l = 0; l < chains.layers; ++l) {
    const SecantMap<T> map = map_of<T>(chains, network, l);
    for (int r = warp(); r < map.rows; r += warps()) {
      const double slope = row_times(map, r, from);
      if (lane() == 0) to[r] = pass_kinks(chains, l + 1, b.values[at + r], slope, reach);
    }
    __syncthreads();
    at += map.rows;
    double* swap = from;
    from = to;
    to = swap;
  }
  reach.down = -block_max(-reach.down, b.scratch);
  reach.up = -block_max(-reach.up, b.scratch);
  return reach;
}

// No barrier is needed at the end: what is read there is the thread's own, or written behind one.
template <class T>
LIPFAST_PHASE void line_of(const SecantChains& chains, const LinesLayout& layout, const SecantLines& lines,
                           int64_t network, LineBuffers& b) {
  const int64_t inputs = chains.widths[0];
  const double* x = lines.x + network * inputs;
  forward_line<T>(chains, network, x, b);
  double* jacobian = backward_line<T>(chains, network, layout, b);
  double* direction = jacobian == b.rows ? b.next : b.rows;
  steepest_direction(chains, layout, jacobian, b, direction);
  const Reach reach = reach_of<T>(chains, network, direction, b);
  double own = 0;
  for (int64_t i = thread(); i < inputs; i += threads()) own = larger(own, fabs(x[i]));
  const double size = block_max(own, b.scratch), scale = size > 0 ? size : 1.0;
  const double down = smaller(reach.down, lines.longest * scale), up = smaller(reach.up, lines.longest * scale);
  double* points = lines.points + network * (1 + 2 * lines.count) * inputs;
  for (int64_t i = thread(); i < inputs; i += threads()) {
    points[i] = x[i];
    for (int s = 0; s < lines.count; ++s) {
      const bool share = s < lines.fractions;
      points[(1 + 2 * s) * inputs + i] = x[i] - lines.steps[s] * (share ? down : scale) * direction[i];
      points[(2 + 2 * s) * inputs + i] = x[i] + lines.steps[s] * (share ? up : scale) * direction[i];
    }
  }
}

// workspace: layout.doubles() per block.
template <class T>
__global__ void __launch_bounds__(kSecantThreads, 2)
    secant_lines_kernel(const __grid_constant__ SecantChains chains, const __grid_constant__ LinesLayout layout,
                        const __grid_constant__ SecantLines lines, double* workspace) {
  LIPFAST_DYNAMIC_SHARED(memory);
  LineBuffers& buffers = *reinterpret_cast<LineBuffers*>(memory);
  place_lines(layout, workspace, buffers);
  for (int64_t network = blockIdx.x; network < chains.networks; network += gridDim.x) {
    line_of<T>(chains, layout, lines, network, buffers);
  }
}

}  // namespace lipfast::cuda

// Certified difference quotients: values at the points with running error bounds, and the best quotient rounded down.
//
// All of it is part of the proof (docs/bounds.md; estimators/lower/quotients.py is the same in torch). Every line below
// that changes a bound says in which direction it rounds. Sums hold in any order, and a product may be fused with a
// sum: that takes a rounding away, and the room for it stays.
#pragma once

#include <cfloat>

#include "secant_chain.cuh"

namespace lipfast::cuda {

constexpr double kUnitRoundoff = 0x1p-53;
constexpr double kUnderflow = 0x1p-1000;  // room for all roundings of one entry that underflow
constexpr int kEvaluationRoundoffs = 32;

constexpr int kEnclosedDepth = 16;  // inputs of a layer in shared memory at a time
constexpr int kPointGroups = 4;     // of threads, each with kSecantPoints / kPointGroups points
constexpr int kGroupPoints = kSecantPoints / kPointGroups;
constexpr int kRowThreads = kSecantThreads / kPointGroups;
constexpr int kThreadRows = 2;
constexpr int kEnclosedRows = kRowThreads * kThreadRows;  // of a layer at a time
constexpr int kSecantPairs = 3 * kMaxSecantSteps;

// k u / (1 - k u), rounded up: three roundings, of relative size u each, and 8 u of room.
__device__ inline double gamma_of(int64_t count) {
  const double product = static_cast<double>(count) * kUnitRoundoff;
  return product / (1 - product) * (1 + 8 * kUnitRoundoff);
}
// At least the number >= 0 that was computed with that many roundings; at most it (lipfast/rounding.py).
__device__ inline double at_least(double value, int64_t roundings) { return value * (1 + 2 * gamma_of(roundings)); }
__device__ inline double at_most(double value, int64_t roundings) { return value * (1 - gamma_of(roundings)); }

// A unit at a point: its value and the bound of its error, or what |W| turns into such bounds.
struct alignas(16) Enclosed {
  double value, error;
};

// The error, or inf where the value is not finite (a partial sum may have overflowed) or the error is NaN.
__device__ inline double proved(double value, double error) {
  return fabs(value) <= DBL_MAX && error == error ? error : static_cast<double>(INFINITY);
}

// As rules/pointwise.py: clipping is exact and passes errors on; LeakyReLU rounds.
__device__ inline Enclosed enclose_activation(const PiecewiseLinear& f, const Enclosed& x) {
  const double out = value_of(f, x.value);
  double bound = x.error;
  if (f.leaky) {
    const double rounding = (fabs(x.value) + fabs(out)) * (kEvaluationRoundoffs * kUnitRoundoff);
    bound = at_least(x.error * larger(1.0, fabs(f.slope)) + rounding, 8) + kUnderflow;
  } else if (f.limited) {
    bound = smaller(at_least(fabs(out) + f.high, 8), x.error);  // |f(x)| + |z|, whatever x is
  }
  return {out, proved(out, bound)};
}

__device__ inline Enclosed activated(const SecantChains& chains, int l, Enclosed x) {
  for (int a = chains.starts[l]; a < chains.starts[l + 1]; ++a) x = enclose_activation(chains.activations[a], x);
  return x;
}

// Shared memory: rows of W, and the points' units as values and sizes; at the end quotients.
struct EnclosureShared {
  double weight[kEnclosedRows][kEnclosedDepth + 1];
  Enclosed units[kEnclosedDepth][kSecantPoints];
  double proved[kSecantPairs], promised[kSecantPairs];
};

// W [first, first + kEnclosedRows) x [from, from + kEnclosedDepth) and the units there; zeros beyond them. A unit's
// error e becomes |x| + e / gamma, which |W| turns into the bound of the map over gamma (1 / gamma is rounded:
// docs/bounds.md counts it). e is 0 or at least 2^-1000, so that the product does not underflow.
template <class T>
__device__ void stage_map(const SecantMap<T>& map, int first, int from, const Enclosed* units, double relative,
                          EnclosureShared& shared) {
  for (int at = static_cast<int>(thread()); at < kEnclosedRows * kEnclosedDepth; at += kSecantThreads) {
    const int r = at / kEnclosedDepth, k = at % kEnclosedDepth;
    const bool inside = first + r < map.rows && from + k < map.cols;
    shared.weight[r][k] = inside ? static_cast<double>(map.weight[int64_t{first + r} * map.cols + from + k]) : 0.0;
  }
  const double over = 1 / relative;
  for (int at = static_cast<int>(thread()); at < kEnclosedDepth * kSecantPoints; at += kSecantThreads) {
    const int k = at / kSecantPoints;
    Enclosed unit{0, 0};
    if (from + k < map.cols) {
      unit = units[int64_t{from} * kSecantPoints + at];
      unit.error = fabs(unit.value) + unit.error * over;
    }
    shared.units[k][at % kSecantPoints] = unit;
  }
}

struct MapSums {
  Enclosed at[kThreadRows][kGroupPoints] = {};
};

__device__ inline void add_staged(const EnclosureShared& shared, int row, int point, MapSums& sums) {
#pragma unroll 2
  for (int k = 0; k < kEnclosedDepth; ++k) {
    double weight[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) weight[r] = shared.weight[row + r * kRowThreads][k];
#pragma unroll
    for (int p = 0; p < kGroupPoints; ++p) {
      const Enclosed unit = shared.units[k][point + p];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        sums.at[r][p].value += weight[r] * unit.value;
        sums.at[r][p].error += fabs(weight[r]) * unit.error;
      }
    }
  }
}

// The sums of a unit at this thread's points become values and errors behind the activations.
template <class T>
LIPFAST_PHASE void finish_unit(const SecantChains& chains, const SecantMap<T>& map, int l, int unit, Enclosed* at) {
  const double relative = gamma_of(map.cols + 2);
  const double shift = map.bias != nullptr ? static_cast<double>(map.bias[unit]) : 0.0;
#pragma unroll 1
  for (int p = 0; p < kGroupPoints; ++p) {
    const double value = at[p].value + shift;
    // gamma comes last: gamma |x| might underflow and then meet a huge weight.
    const double bound = at_least((at[p].error + fabs(shift)) * relative, map.cols + 8) + kUnderflow;
    at[p] = activated(chains, l + 1, {value, proved(value, bound)});
  }
}

// to = the units of layer l with its activations, [unit][point], from those below. Ends with a barrier.
template <class T>
__device__ void enclose_layer(const SecantChains& chains, int64_t network, int l, const Enclosed* from, Enclosed* to,
                              EnclosureShared& shared) {
  const SecantMap<T> map = map_of<T>(chains, network, l);
  const double relative = gamma_of(map.cols + 2);
  const int row = static_cast<int>(thread()) % kRowThreads;
  const int point = static_cast<int>(thread()) / kRowThreads * kGroupPoints;
#pragma unroll 1
  for (int first = 0; first < map.rows; first += kEnclosedRows) {
    MapSums sums;
#pragma unroll 1
    for (int k = 0; k < map.cols; k += kEnclosedDepth) {
      stage_map(map, first, k, from, relative, shared);
      __syncthreads();
      add_staged(shared, row, point, sums);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int p = 0; p < kGroupPoints; ++p) {
        const int unit = first + row + r * kRowThreads;
        if (unit < map.rows) to[int64_t{unit} * kSecantPoints + point + p] = sums.at[r][p];
      }
    }
    for (int unit = first + row; unit < smaller(map.rows, first + kEnclosedRows); unit += kRowThreads) {
      finish_unit(chains, map, l, unit, to + int64_t{unit} * kSecantPoints + point);
    }
  }
  __syncthreads();
}

// A norm of numbers >= 0 that the lanes of a warp hold one after another, with at most n + 2 roundings.
class VectorNorm {
 public:
  __device__ explicit VectorNorm(int norm) : norm_(norm) {}
  // What is not a number counts as infinite.
  __device__ void add(double entry) {
    const double size = entry <= DBL_MAX ? entry : static_cast<double>(INFINITY);
    if (norm_ == 0) {
      sum_ = larger(sum_, size);
    } else {
      sum_ += norm_ == 1 ? size : size * size;
    }
  }
  __device__ double of_warp() const {
    if (norm_ == 0) return warp_max(sum_);
    const double total = warp_sum(sum_);
    return norm_ == 1 ? total : sqrt(total);
  }

 private:
  int norm_;
  double sum_ = 0;
};

// The quotient rounded down, or 0: also where the points coincide, a value overflowed, or numbers are so small that
// squares underflow or the quotient is denormal, whose rounding is not relative.
__device__ inline double sound(double numerator, double denominator) {
  const double value = at_most(numerator / denominator, 4);
  const bool holds = value > 1e-300 && value <= DBL_MAX && denominator > 1e-140 && numerator > 1e-140;
  return holds ? value : 0.0;
}

// The two points of pair i: down and up of a step, the sample and up, down and the sample.
__device__ inline int first_of(int pair) { return pair % 3 == 1 ? 0 : 1 + 2 * (pair / 3); }
__device__ inline int second_of(int pair) { return pair % 3 == 2 ? 0 : 2 + 2 * (pair / 3); }

// Sets the quotients of all pairs, proved and as they would be without errors; a warp has a pair.
LIPFAST_PHASE void quotients_of(const SecantChains& chains, const double* points, int pairs, const Enclosed* outputs,
                                EnclosureShared& shared) {
  const int64_t inputs = chains.widths[0], count = chains.widths[chains.layers];
  for (int pair = warp(); pair < pairs; pair += warps()) {
    const int a = first_of(pair), b = second_of(pair);
    VectorNorm apart(chains.norm), moved(chains.norm), free(chains.norm);
    for (int64_t i = lane(); i < inputs; i += kWarp) {
      apart.add(at_least(fabs(points[a * inputs + i] - points[b * inputs + i]), 2));
    }
    for (int64_t k = lane(); k < count; k += kWarp) {
      const Enclosed &one = outputs[k * kSecantPoints + a], &other = outputs[k * kSecantPoints + b];
      const double change = at_most(fabs(one.value - other.value), 2), room = at_least(one.error + other.error, 2);
      moved.add(at_most(larger(0.0, change - room), 2));
      free.add(at_most(larger(0.0, change), 2));
    }
    const double distance = apart.of_warp() * (1 + gamma_of(inputs + 8));
    const double numerator = at_most(moved.of_warp(), count + 8), promised = at_most(free.of_warp(), count + 8);
    if (lane() == 0) {
      shared.proved[pair] = sound(numerator, distance);
      shared.promised[pair] = sound(promised, distance);
    }
  }
}

template <class T>
__device__ void quotient_of(const SecantChains& chains, const SecantQuotients& quotients, int64_t network,
                            Enclosed* from, Enclosed* to, EnclosureShared& shared) {
  const int64_t inputs = chains.widths[0];
  const int count = 1 + 2 * quotients.count, pairs = 3 * quotients.count;
  const double* points = quotients.points + network * count * inputs;
  // The first inputs that are staged are a thread's own, and barriers lie before the others.
  for (int64_t at = thread(); at < inputs * kSecantPoints; at += kSecantThreads) {
    const int64_t i = at / kSecantPoints, p = at % kSecantPoints;
    from[at] = p < count ? activated(chains, 0, {points[p * inputs + i], 0}) : Enclosed{0, 0};
  }
  for (int l = 0; l < chains.layers; ++l) {
    enclose_layer<T>(chains, network, l, from, to, shared);
    Enclosed* swap = from;
    from = to;
    to = swap;
  }
  quotients_of(chains, points, pairs, from, shared);
  __syncthreads();
  int best = 0;
  double promised = 0;
  for (int pair = 0; pair < pairs; ++pair) {
    if (shared.proved[pair] > shared.proved[best]) best = pair;
    promised = larger(promised, shared.promised[pair]);
  }
  if (thread() == 0) {
    quotients.found[2 * network] = shared.proved[best];
    quotients.found[2 * network + 1] = shared.proved[best] < quotients.tight * promised ? 1.0 : 0.0;
  }
  for (int64_t i = thread(); i < inputs; i += threads()) {
    quotients.ends[2 * network * inputs + i] = points[first_of(best) * inputs + i];
    quotients.ends[(2 * network + 1) * inputs + i] = points[second_of(best) * inputs + i];
  }
}

// workspace: enclosure_doubles() per block.
template <class T>
__global__ void __launch_bounds__(kSecantThreads, 2)
    secant_quotients_kernel(const __grid_constant__ SecantChains chains,
                            const __grid_constant__ SecantQuotients quotients, double* workspace) {
  LIPFAST_DYNAMIC_SHARED(memory);
  EnclosureShared& shared = *reinterpret_cast<EnclosureShared*>(memory);
  const int64_t half = enclosure_doubles(chains.widest) / 2;
  double* own = workspace + 2 * half * blockIdx.x;
  for (int64_t network = blockIdx.x; network < chains.networks; network += gridDim.x) {
    quotient_of<T>(chains, quotients, network, reinterpret_cast<Enclosed*>(own),
                   reinterpret_cast<Enclosed*>(own + half), shared);
  }
}

}  // namespace lipfast::cuda

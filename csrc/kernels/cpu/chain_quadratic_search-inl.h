// Multipliers of a chain: a start, and a descent in log D (L-BFGS) with backtracking. Whatever they are, the
// certificate decides; every network of a call does the same work unless it has converged.
#ifndef LIPFAST_CHAIN_QUADRATIC_SEARCH_INL_H
#define LIPFAST_CHAIN_QUADRATIC_SEARCH_INL_H

#include "chain_quadratic_memory-inl.h"
#include "chain_quadratic_sweep-inl.h"

constexpr double kLargestStep = 2;      // of log D
constexpr double kDescent = 1e-4;       // Armijo's condition (Nocedal and Wright 2006, section 3.1)
constexpr double kFirstStep = 0.3;      // the largest entry of one along the gradient
constexpr double kSmallestStep = 1e-3;  // share of a step
constexpr double kCarried = 0.8;        // of log D of an earlier result, in a start from it
constexpr double kMostCarried = 4;      // that is off the closed form
constexpr double kFarOff = 0.72;  // largest eigenvalue of D^-1/2 K D^-1/2 from which an earlier D is of other weights
constexpr double kTooFarOff = 1;  // and says nothing
constexpr int64_t kFarEvaluations = 4, kColdEvaluations = 10;  // at least, then
constexpr double kShare = 0.5;                                 // of |m| / r in the other closed form
constexpr double kLeastGain = 1e-7;                            // of the logarithm, from a step
constexpr double kMostRescaling = 20;  // of a matrix, twice: scaled weights stay within what the proof takes
constexpr int64_t kFirstPower = 8;
constexpr double kSmallestLog = -140, kLargestLog = 140;  // of a multiplier: far inside what the proof takes

template <class S>
struct Search {
  Sweep<S> sweep;
  const int32_t* base;  // exponents of the matrices by their norms, L
  int32_t* shifts;      // and as they are
  // Of all hidden units, one layer after the other: log D, and steps in it.
  double *best, *here, *last, *step, *gradient, *last_gradient;
  LimitedMemory memory;
  S *vector, *image;  // of the widest hidden layer
  const int32_t* const* unit;
  int64_t units, evaluated;
  double share = 1;  // of |m| / r in the closed form
  double begun = 0;  // about log2 of rho where the search starts
  bool far = false;  // whether a start from an earlier result is of other weights: as the last layer says

  Search(const QuadraticProblem& problem, Arena& arena);
  template <class T>
  bool start(const QuadraticProblem& problem, bool warm, double of_ratio);
  template <class T>
  bool cold_start(const QuadraticProblem& problem);
  double improve(int64_t evaluations);
  double step_once();

 private:
  void rescale(int64_t i);
  double top_of(int64_t i, const S* scale, int iterations = 8);
  void closed_form(int64_t i);
  bool warm_start(const QuadraticProblem& problem, int64_t i);
  bool make_feasible(int64_t i);
  void differentiate();
  double choose_step();
  Smoothed turn_to(int64_t power);
  bool forward(double t);
  void keep(double* to);
  template <class Body>
  void each_unit(const Body& body) {
    for (int64_t i = 0, u = 0; i < sweep.hidden; ++i) {
      for (int64_t j = 0; j < sweep.layers[i].n; ++j, ++u) body(sweep.layers[i], j, u);
    }
  }
};

template <class S>
Search<S>::Search(const QuadraticProblem& problem, Arena& arena) : sweep(problem, arena), units(0), evaluated(1) {
  int64_t most = 0;
  for (int64_t i = 1; i < problem.layers; ++i) {
    units += problem.sizes[i];
    most = larger(most, padded_rows<S>(problem.sizes[i]));
  }
  double** const vectors[] = {&best, &here, &last, &step, &gradient, &last_gradient};
  for (double** own : vectors) *own = arena.take<double>(units);
  memory = {arena.take<double>(kRemembered * units), arena.take<double>(kRemembered * units), units, 0, 0};
  shifts = arena.take<int32_t>(problem.layers);
  vector = arena.take<S>(most);
  image = arena.take<S>(most);
}

template <class S>
void multiply_by(S factor, const Panels<S>& panels) {
  for (int64_t e = 0; e < panels.size(); ++e) panels.data[e] *= factor;
}

// Brings the trace of K of layer i (the outputs: i = hidden) to about 1, by the exponent of the matrix before it.
template <class S>
void Search<S>::rescale(int64_t i) {
  const Panels<S>& k = i == 0 ? sweep.k1 : sweep.k[i % 2];
  const int64_t n = i < sweep.hidden ? sweep.layers[i].n : sweep.outputs;
  double trace = 0;
  for (int64_t j = 0; j < n; ++j) trace += k.entry(j, j);
  if (!(trace > 0) || !(trace < INFINITY)) return;
  const double power = round(0.5 * log2(trace));
  const int e = static_cast<int>(larger(-kMostRescaling, smaller(kMostRescaling, power)));
  if (e == 0) return;
  shifts[i] += e;
  const S factor = static_cast<S>(ldexp(1.0, -e));
  for (int64_t row = 0; row < k.rows; row += kPanelRows<S>) {
    for (int64_t c = 0; c < (row + kPanelRows<S>)*kPanelRows<S>; ++c) k.at(row, 0)[c] *= factor * factor;
  }
  if (i == 0) return;
  multiply_by(factor, sweep.layers[i - 1].w);
  multiply_by(factor, sweep.layers[i - 1].b);
}

// Largest eigenvalue of scale K scale, by power iteration, and a little more for what that misses.
template <class S>
double Search<S>::top_of(int64_t i, const S* scale, int iterations) {
  const Panels<S>& k = i == 0 ? sweep.k1 : sweep.k[i % 2];
  const int64_t n = sweep.layers[i].n;
  double norm = 0;
  for (int64_t j = 0; j < k.rows; ++j) vector[j] = j < n ? static_cast<S>(1 + 0.25 * (j % 4)) * scale[j] : 0;
  for (int iteration = 0; iteration < iterations; ++iteration) {
    multiply_lower(k, vector, image);
    double squares = 0, before = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double own = static_cast<double>(vector[j]) / scale[j], next = static_cast<double>(image[j]) * scale[j];
      before += own * own;
      squares += next * next;
    }
    const double last = norm;
    norm = sqrt(squares / before);
    if (!(norm > 0) || norm - last < 1e-4 * norm) return 1.0005 * norm;
    const double factor = 1 / sqrt(squares);
    for (int64_t j = 0; j < n; ++j) vector[j] = static_cast<S>(image[j] * factor * scale[j] * scale[j]);
  }
  return 1.02 * norm;
}

// 1 + share |m| / r; r = 0: a large multiplier stands for infinity.
template <class S>
double wider_than(const SweepLayer<S>& at, int64_t j, double share) {
  const double m = fabs(at.mean[j]), r = sqrt(larger(0.0, m * m - at.product[j]));
  return share * m < 999 * r ? larger(1 + share * m / r, 1 + 1e-5) : 1e3;
}

// The balanced closed form: D_j = (1 + share |m_j| / r_j) lambda_max(S^-1/2 K S^-1/2) S_j, S_j = sqrt(K_jj) / |W e_j|.
template <class S>
void Search<S>::closed_form(int64_t i) {
  const SweepLayer<S>& at = sweep.layers[i];
  const Panels<S>& k = i == 0 ? sweep.k1 : sweep.k[i % 2];
  double most = 0, most_size = 0;
  for (int64_t j = 0; j < at.n; ++j) {
    typename Simd<S>::Vector squares{};
    for (int64_t row = 0; row < at.w.rows; row += Simd<S>::kLanes) {
      const auto own = load(&at.w.entry(row, j));
      squares += own * own;
    }
    at.rise[j] = sqrt(static_cast<double>(horizontal_sum<S>(squares)));
    most = larger(most, at.rise[j]);
  }
  for (int64_t j = 0; j < at.n; ++j) {
    const double column = larger(at.rise[j], 1e-6 * most), row = k.entry(j, j);
    at.rise[j] = column > 0 && row > 0 ? sqrt(row) / column : 0;
    most_size = larger(most_size, at.rise[j]);
  }
  for (int64_t j = 0; j < at.n; ++j) {
    at.rise[j] = most_size > 0 ? larger(at.rise[j], 1e-6 * most_size) : 1;
    at.scale[j] = static_cast<S>(1 / sqrt(at.rise[j]));
  }
  double narrowest = 1;
  for (int64_t j = 0; j < at.n; ++j) narrowest = smaller(narrowest, wider_than(at, j, share) - 1);
  // Where little of a multiplier is above the eigenvalue, that has to be known well.
  const double top = larger(top_of(i, at.scale, narrowest < 0.05 ? 200 : 8), 0x1p-60);
  for (int64_t j = 0; j < at.n; ++j) {
    at.log[j] = log(wider_than(at, j, share) * top * at.rise[j]);
  }
}

// Between the closed form and D of an earlier result, scaled up where it is not feasible; false where that says nothing
// of this network: it is far from feasible, or far from the closed form. The best D leave no room (D - K is nearly
// singular), so that D of other weights, even of ones a little way off, may be far worse than the closed form; a little
// of that gives the room.
template <class S>
bool Search<S>::warm_start(const QuadraticProblem& problem, int64_t i) {
  const SweepLayer<S>& at = sweep.layers[i];
  int64_t sum = 0;
  for (int64_t l = 0; l <= i; ++l) sum += shifts[l];
  closed_form(i);
  int64_t clipped = 0;
  for (int64_t j = 0; j < at.n; ++j) {
    const double units = problem.start[i][j] + 2.0 * static_cast<double>(unit[i][j] - sum);
    const double off = units * 0.6931471805599453 - at.log[j];
    if (!(fabs(off) < kLargestLog)) return false;
    clipped += fabs(off) > kMostCarried;
    at.fall[j] = larger(-kMostCarried, smaller(kMostCarried, off));
    at.scale[j] = static_cast<S>(exp(-0.5 * (at.log[j] + at.fall[j])));
  }
  const double tight = top_of(i, at.scale);
  if (!(tight < kTooFarOff) || 8 * clipped > at.n) return false;
  far = tight > kFarOff;
  for (int64_t j = 0; j < at.n; ++j) {
    at.log[j] += kCarried * at.fall[j];
    at.scale[j] = static_cast<S>(exp(-0.5 * at.log[j]));
  }
  const double top = top_of(i, at.scale);
  if (!(top < 4)) return false;
  const double add = top > 1 / 1.005 ? log(1.005 * top) : 0;
  for (int64_t j = 0; j < at.n; ++j) at.log[j] += add;
  return true;
}

template <class S>
bool Search<S>::make_feasible(int64_t i) {
  for (int attempt = 0; attempt < 24 && !sweep.stopped; ++attempt) {
    if (sweep.layer(i)) return true;
    const double add = attempt < 8 ? ldexp(0.002, attempt) : 1;
    for (int64_t j = 0; j < sweep.layers[i].n; ++j) sweep.layers[i].log[j] += add;
  }
  return false;
}

// Packs the weights, scales them, and takes a feasible point layer by layer. False: none was found.
template <class S>
template <class T>
bool Search<S>::start(const QuadraticProblem& problem, bool warm, double of_ratio) {
  share = of_ratio;
  for (int64_t i = 0; i < problem.layers; ++i) {
    shifts[i] = base[i];
    const EntryScaling scaling{i < sweep.hidden ? unit[i] : nullptr, i > 0 ? unit[i - 1] : nullptr, shifts[i]};
    pack_scaled(static_cast<const T*>(problem.weights[i]), problem.sizes[i + 1], problem.sizes[i], scaling,
                i == 0 ? sweep.first : sweep.layers[i - 1].w);
  }
  symmetric_product(sweep.first, sweep.first, sweep.k1, sweep.parallel);
  rescale(0);
  for (int64_t i = 0; i < sweep.hidden; ++i) {
    if (!warm) {
      closed_form(i);
    } else if (!warm_start(problem, i)) {
      return false;
    }
    if (!make_feasible(i)) return false;
    sweep.next_k(i);
    rescale(i + 1);
  }
  sweep.read_m();
  keep(here);
  keep(best);
  const double top = sweep.top(kFirstPower, false).top;
  begun = 0.5 * log2(top);
  for (int64_t i = 0; i < problem.layers; ++i) begun += shifts[i];
  return top >= 0;
}

// The better of two closed forms. With the whole of |m| / r a layer costs at most what its norms multiply to, which is
// best where all layers are nearly of rank one; with half of it K of the layers that follow is smaller, mostly, up to a
// half of the bound after ten layers.
template <class S>
template <class T>
bool Search<S>::cold_start(const QuadraticProblem& problem) {
  const bool whole = start<T>(problem, false, 1);
  const double first = begun;
  if (sweep.stopped) return false;
  ++evaluated;
  if (start<T>(problem, false, kShare) && (!whole || begun < first)) return true;
  return whole && start<T>(problem, false, 1);
}

// The gradient by log D where the sweep stands, of the logarithm of the smoothed maximum.
template <class S>
void Search<S>::differentiate() {
  sweep.backward();
  each_unit([&](const SweepLayer<S>& at, int64_t j, int64_t u) {
    const double slope = at.rise[j] - at.fall[j];
    gradient[u] = fabs(slope) < INFINITY ? slope : 0;
  });
}

// The step to take from `here`; returns the slope along it.
template <class S>
double Search<S>::choose_step() {
  memcpy(step, gradient, sizeof(double) * static_cast<size_t>(units));
  if (memory.count > 0) memory.multiply(step);
  double largest = 0;
  for (int64_t u = 0; u < units; ++u) largest = larger(largest, fabs(step[u]));
  const double longest = memory.count > 0 ? smaller(1.0, kLargestStep / largest) : kFirstStep / largest;
  scale(largest > 0 ? -longest : 0, step, units);
  return dot(gradient, step, units);
}

// Sweeps at `here` + t `step`; whether D is feasible there.
template <class S>
bool Search<S>::forward(double t) {
  each_unit([&](const SweepLayer<S>& at, int64_t j, int64_t u) {
    at.log[j] = larger(kSmallestLog, smaller(kLargestLog, here[u] + t * step[u]));
  });
  ++evaluated;
  return sweep.forward();
}

// Keeps the multipliers of the last sweep.
template <class S>
void Search<S>::keep(double* to) {
  each_unit([&](const SweepLayer<S>& at, int64_t j, int64_t u) { to[u] = at.log[j]; });
}

// Powers of the smoothed maximum grow in three stages.
LIPFAST_INLINE int64_t power_at(int64_t evaluation, int64_t evaluations) {
  const int64_t first = larger<int64_t>(10, evaluations / 3);
  return evaluation < first ? kFirstPower : evaluation < 2 * first ? 4 * kFirstPower : kMostPower;
}

// The gradient at `here` for another power, which the steps before say nothing of.
template <class S>
Smoothed Search<S>::turn_to(int64_t power) {
  memory.forget();
  const Smoothed now = sweep.top(power, true);
  differentiate();
  return now;
}

// One step that is not tried: `here` is where it leads. Returns about rho^2 of `best`, where it began.
template <class S>
double Search<S>::step_once() {
  const Smoothed now = turn_to(kFirstPower);
  choose_step();
  for (int64_t u = 0; u < units; ++u) here[u] = larger(kSmallestLog, smaller(kLargestLog, here[u] + step[u]));
  return now.top;
}

// Returns about the least rho^2 found. Where steps lead nowhere the search goes on from the best point with another
// power, as long as that helps.
template <class S>
double Search<S>::improve(int64_t evaluations) {
  const int64_t end = evaluated + evaluations;
  int64_t power = kFirstPower;
  if (evaluations == 0) return sweep.top(power, false).top;
  Smoothed now = turn_to(power);
  double least = now.top, stalled = INFINITY, t = 1, slope = choose_step();
  while (evaluated < end) {
    const bool feasible = forward(t);
    if (sweep.stopped) break;
    const Smoothed next = feasible ? sweep.top(power, false) : Smoothed{INFINITY, INFINITY};
    if (next.top < least) {
      least = next.top;
      keep(best);
    }
    const double gain = now.value - next.value;
    const bool accepted = gain >= -kDescent * t * slope && gain > kLeastGain;
    if (evaluated == end) break;
    if (accepted) {
      exchange(here, last);
      exchange(gradient, last_gradient);
      keep(here);
      const int64_t wanted = larger(power, power_at(evaluated, evaluations));
      if (wanted == power) {
        now = next;
        sweep.top(power, true);
        differentiate();
        memory.add(last, here, last_gradient, gradient);
      } else {
        now = turn_to(power = wanted);
      }
    } else {
      t *= feasible ? 0.5 : 0.3;
      if (t > kSmallestStep && gain < -kLeastGain) continue;
      if (memory.count > 0) {
        memory.forget();
      } else {
        if (!(least < stalled * (1 - 10 * kLeastGain))) break;
        stalled = least;
        memcpy(here, best, sizeof(double) * static_cast<size_t>(units));
        if (!forward(0)) break;
        now = turn_to(power = power == kMostPower ? 4 * kFirstPower : 4 * power);
      }
    }
    slope = choose_step();
    t = 1;
  }
  return least;
}

#endif

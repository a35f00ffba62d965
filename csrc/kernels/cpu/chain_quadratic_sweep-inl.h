// The sweep K_{i+1} = W (m D (D - K)^-1 D m - p D) W^T over the layers, with its derivative by log D, in float32 or
// float64, on the scaled I - D^-1/2 K D^-1/2. Nothing of it enters a proof.
#ifndef LIPFAST_CHAIN_QUADRATIC_SWEEP_INL_H
#define LIPFAST_CHAIN_QUADRATIC_SWEEP_INL_H

#include "chain_quadratic_balance-inl.h"
#include "chain_quadratic_top-inl.h"
#include "lanczos-inl.h"

// Memory handed out piece by piece; without any it only counts.
class Arena {
 public:
  LIPFAST_INLINE explicit Arena(void* memory) : memory_(static_cast<char*>(memory)), used_(0) {}
  template <class T>
  LIPFAST_INLINE T* take(int64_t count) {
    const int64_t begin = used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + begin);
  }
  template <class T>
  LIPFAST_INLINE Panels<T> panels(int64_t rows, int64_t columns) {
    Panels<T> result{nullptr, padded_rows<T>(rows), columns};
    result.data = take<T>(result.size());
    return result;
  }
  LIPFAST_INLINE int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_;
};

// A hidden layer and the matrix that follows it.
template <class S>
struct SweepLayer {
  int64_t n, next;
  bool bent;                                    // some p is not 0
  Panels<S> w, l, b;                            // W_{i+1}; the factor, and its rows of W
  S *inverse, *scale, *columns, *curve, *ones;  // scale: D^-1/2; columns: m D^1/2; curve: p D
  S *sensitivity, *drive;                       // s and w of the derivative: padded rows of `width`
  const double *mean, *product;
  double *log, *rise, *fall;  // log D where it stands; what D's growth adds to the logarithm of the value, and takes
};

template <class S>
struct Sweep {
  int64_t hidden, outputs, width;  // of `sensitivity`
  SweepLayer<S>* layers;
  Panels<S> first, k1, k[2], curved;  // W_1; K_1; K of even and odd layers; W p D
  S* end;                             // s of the output: padded rows of `width`
  double *m, *q, *z, *products, *room;
  const Parallel* parallel;
  const Stop* stop;
  bool stopped;

  Sweep(const QuadraticProblem& problem, Arena& arena);
  bool layer(int64_t i);
  void next_k(int64_t i);
  bool forward();
  void read_m();
  Smoothed top(int64_t power, bool derivative);
  void backward();
};

LIPFAST_INLINE bool asked_to_stop(const Stop* stop) { return stop != nullptr && stop->asked(stop->argument); }

LIPFAST_INLINE int64_t widest_layer(const QuadraticProblem& problem) {
  int64_t most = 0;
  for (int64_t i = 0; i <= problem.layers; ++i) most = larger(most, problem.sizes[i]);
  return most;
}

template <class S>
Sweep<S>::Sweep(const QuadraticProblem& problem, Arena& arena)
    : hidden(problem.layers - 1),
      outputs(problem.sizes[problem.layers]),
      parallel(problem.parallel),
      stop(problem.stop),
      stopped(false) {
  width = round_up(outputs <= kDenseOutputs ? outputs : kRitzVectors, Simd<S>::kLanes);
  layers = arena.take<SweepLayer<S>>(hidden);
  int64_t most = padded_rows<S>(outputs), most_curved = 0;
  for (int64_t i = 0; i < hidden; ++i) {
    const int64_t n = problem.sizes[i + 1], next = problem.sizes[i + 2], rows = padded_rows<S>(n);
    most = larger(most, rows);
    SweepLayer<S> layer{};
    layer.n = n;
    layer.next = next;
    layer.w = arena.panels<S>(next, padded_columns(n));
    layer.l = arena.panels<S>(n, padded_columns(n));
    layer.b = arena.panels<S>(next, padded_columns(n));
    most_curved = larger(most_curved, layer.w.size());
    S** const vectors[] = {&layer.inverse, &layer.scale, &layer.columns, &layer.curve, &layer.ones};
    for (S** vector : vectors) *vector = arena.take<S>(rows);
    layer.sensitivity = arena.take<S>(rows * width);
    layer.drive = arena.take<S>(rows * width);
    double** const numbers[] = {&layer.log, &layer.rise, &layer.fall};
    for (double** vector : numbers) *vector = arena.take<double>(rows);
    if (layers == nullptr) continue;
    layer.mean = problem.means[i];
    layer.product = problem.products[i];
    for (int64_t j = 0; j < n; ++j) layer.bent |= layer.product[j] != 0;
    for (int64_t j = 0; j < rows; ++j) {
      layer.ones[j] = 1;
      layer.scale[j] = layer.columns[j] = layer.curve[j] = 0;
    }
    layers[i] = layer;
  }
  first = arena.panels<S>(problem.sizes[1], padded_columns(problem.sizes[0]));
  k1 = arena.panels<S>(problem.sizes[1], padded_rows<S>(problem.sizes[1]));
  k[0].data = arena.take<S>(most * most);
  k[1].data = arena.take<S>(most * most);
  curved.data = arena.take<S>(most_curved);
  end = arena.take<S>(padded_rows<S>(outputs) * width);
  m = arena.take<double>(outputs * outputs);
  q = arena.take<double>(outputs * (outputs <= kDenseOutputs ? outputs : kRitzVectors));
  z = arena.take<double>(outputs <= kDenseOutputs ? 0 : outputs * kRitzVectors);
  products = arena.take<double>(outputs <= kDenseOutputs ? 0 : outputs * kRitzVectors);
  room = arena.take<double>(smoothed_top_size(outputs));
  if (layers == nullptr) return;
  for (int64_t v = 0; outputs > kDenseOutputs && v < kRitzVectors; ++v) {
    random_vector(static_cast<uint64_t>(v), z + v * outputs, outputs);
  }
}

// Factors layer i for its log D. False: not positive definite, or stopped.
template <class S>
bool Sweep<S>::layer(int64_t i) {
  stopped = stopped || asked_to_stop(stop);
  if (stopped) return false;
  SweepLayer<S>& at = layers[i];
  for (int64_t j = 0; j < at.n; ++j) {
    const double root = exp(0.5 * at.log[j]);
    at.scale[j] = static_cast<S>(1 / root);
    at.columns[j] = static_cast<S>(at.mean[j] * root);
    at.curve[j] = static_cast<S>(at.product[j] * root * root);
  }
  const Step<S> step{i == 0 ? k1 : k[i % 2], at.w, at.ones, at.scale, at.columns, at.l, at.b, at.inverse};
  return factor_step(step, parallel);
}

// to = W p D
template <class S>
void scale_columns(const SweepLayer<S>& at, const Panels<S>& to) {
  constexpr int64_t kRows = kPanelRows<S>, kLanes = Simd<S>::kLanes;
  for (int64_t row = 0; row < to.rows; row += kRows) {
    for (int64_t c = 0; c < to.columns; ++c) {
      const typename Simd<S>::Vector factor = splat(at.curve[c]);
      store(to.at(row, c), load(at.w.at(row, c)) * factor);
      store(to.at(row, c) + kLanes, load(at.w.at(row, c) + kLanes) * factor);
    }
  }
}

// K of what follows layer i, which has been factored.
template <class S>
void Sweep<S>::next_k(int64_t i) {
  const SweepLayer<S>& at = layers[i];
  const int64_t rows = at.w.rows;
  Panels<S>& out = k[(i + 1) % 2];
  out = {out.data, rows, rows};
  symmetric_product(at.b, at.b, out, parallel);
  if (!at.bent) return;
  Panels<S>& other = k[i % 2];  // K_i was used up
  other = {other.data, rows, rows};
  curved = {curved.data, at.w.rows, at.w.columns};
  scale_columns(at, curved);
  symmetric_product(curved, at.w, other, parallel);
  for (int64_t row = 0; row < rows; row += kPanelRows<S>) {
    for (int64_t e = 0; e < (row + kPanelRows<S>)*kPanelRows<S>; ++e) out.at(row, 0)[e] -= other.at(row, 0)[e];
  }
}

template <class S>
bool Sweep<S>::forward() {
  for (int64_t i = 0; i < hidden; ++i) {
    if (!layer(i)) return false;
    next_k(i);
  }
  read_m();
  return true;
}

template <class S>
void Sweep<S>::read_m() {
  const Panels<S>& last = k[hidden % 2];
  for (int64_t i = 0; i < outputs; ++i) {
    for (int64_t j = 0; j <= i; ++j) m[i * outputs + j] = m[j * outputs + i] = last.entry(i, j);
  }
}

template <class S>
Smoothed Sweep<S>::top(int64_t power, bool derivative) {
  double* to = derivative ? q : nullptr;
  if (outputs <= kDenseOutputs) return smoothed_top(m, outputs, power, to, room);
  return smoothed_top_of_many(m, outputs, power, z, products, to, room, parallel);
}

// From Q: rise and fall of every unit, D times what (1) takes of them.
template <class S>
void Sweep<S>::backward() {
  const int64_t used = outputs <= kDenseOutputs ? outputs : kRitzVectors;
  memset(end, 0, sizeof(S) * static_cast<size_t>(padded_rows<S>(outputs) * width));
  for (int64_t i = 0; i < outputs; ++i) {
    for (int64_t v = 0; v < used; ++v) end[i * width + v] = static_cast<S>(q[i * used + v]);
  }
  const S* next = end;
  for (int64_t i = hidden - 1; i >= 0; --i) {
    const SweepLayer<S>& at = layers[i];
    transposed_product(at.b, at.next, next, width, at.sensitivity, parallel);
    transposed_product(at.w, at.next, next, width, at.drive, parallel);
    solve_transposed(at.l, at.inverse, at.n, at.sensitivity, width);
    for (int64_t j = 0; j < at.n; ++j) {
      const typename Simd<S>::Vector factor = splat(at.scale[j]);
      typename Simd<S>::Vector squares{}, mixed{}, drives{};
      for (int64_t v = 0; v < width; v += Simd<S>::kLanes) {
        S* to = at.sensitivity + j * width + v;
        const auto s = load(to) * factor, w = load(at.drive + j * width + v);
        store(to, s);
        squares += s * s;
        mixed += w * s;
        drives += w * w;
      }
      const double d = exp(at.log[j]);
      at.fall[j] = d * horizontal_sum<S>(squares);
      at.rise[j] = d * (2 * at.mean[j] * horizontal_sum<S>(mixed) - at.product[j] * horizontal_sum<S>(drives));
    }
    next = at.sensitivity;
  }
}

#endif

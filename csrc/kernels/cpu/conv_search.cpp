// The search of conv_norms: a good lower value first, then branch and bound. Only the tests of cells are proofs;
// everything else decides how many of them are needed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>

#include "conv_cells.h"

namespace lipfast {
namespace {

constexpr double kUnitRoundoff = 0x1p-53;
constexpr double kWiden = 1 + 0x1p-20;
constexpr double kTiny = 0x1p-900;
constexpr double kPhaseError = 64 * kUnitRoundoff;

double gamma(int64_t k) {
  const double ku = static_cast<double>(k) * kUnitRoundoff;
  return ku / (1 - ku) * kWiden;
}

class Buffer {
 public:
  explicit Buffer(int64_t doubles)
      : memory_(static_cast<double*>(::operator new(static_cast<size_t>(std::max<int64_t>(doubles, 1)) * sizeof(double),
                                                    std::align_val_t{64}))) {}
  double* get() const { return memory_.get(); }

 private:
  struct Release {
    void operator()(double* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<double, Release> memory_;
};

// Scratch memory that the items of one search hand on to each other.
class Pool {
 public:
  explicit Pool(int64_t doubles) : doubles_(doubles) {}
  class Lease {
   public:
    explicit Lease(Pool& pool) : pool_(pool), buffer_(pool.take()) {}
    ~Lease() { pool_.give(std::move(buffer_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    double* get() const { return buffer_->get(); }

   private:
    Pool& pool_;
    std::unique_ptr<Buffer> buffer_;
  };

 private:
  std::unique_ptr<Buffer> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Buffer>(doubles_);
    auto buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }
  void give(std::unique_ptr<Buffer> buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }
  int64_t doubles_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Buffer>> free_;
};

// Differences of two taps that are lexicographically positive, zero first.
std::vector<int64_t> positive_offsets(const ConvProblem& problem) {
  std::vector<int64_t> out;
  const int64_t* k = problem.sizes;
  for (int64_t a = 0; a < k[0]; ++a) {
    for (int64_t b = a > 0 ? 1 - k[1] : 0; b < k[1]; ++b) {
      for (int64_t c = a > 0 || b > 0 ? 1 - k[2] : 0; c < k[2]; ++c) out.insert(out.end(), {a, b, c});
    }
  }
  return out;
}

struct Maximum {
  double value = -1;  // of the Gram matrix's largest eigenvalue: an estimate from below
  int64_t group = 0;
  Frequency p{0, 0, 0};
  std::vector<double> x;
};

class Search {
 public:
  Search(const ConvProblem& problem, ConvResult& result)
      : problem_(problem),
        result_(result),
        kernels_(conv_kernels()),
        cells_(problem),
        offsets_(positive_offsets(problem)),
        count_(static_cast<int64_t>(offsets_.size()) / 3),
        half_(conv_vector_half(problem.rows)) {}

  void run();

 private:
  template <class Body>
  void each(int64_t count, const Body& body) const;
  double gram_bytes() const;
  void form_grams(double largest);
  void run_without_grams();
  GramTable table(int64_t group) const;
  std::vector<double> phases(const Frequency& p) const;
  double trace(int64_t group, const double* phases) const;
  bool is_below(double trace, double target, int64_t group) const;

  bool find_start(Maximum& known) const;
  void estimate();
  std::vector<double> start_vector() const;
  void take(Maximum found);
  Maximum ascend(Maximum from) const;
  double top(Maximum& at, int32_t passes) const;
  Frequency polynomial_maximum(const std::vector<double>& coefficients, Frequency from, double* value) const;

  void bound_below();
  double target(int32_t level) const;
  double cosine_below(int64_t cycles) const;
  double shift(int64_t group, double bound, double sign) const;
  std::vector<bool> prove(const std::vector<Cell>& cells, const std::vector<double>& bounds, double sign);

  void branch_and_bound();
  void test_chunk(std::vector<Cell>& chunk, std::vector<Cell>& open);
  void refine(const std::vector<Cell>& failed);
  void push_children(const Cell& cell);
  bool worth_testing(int32_t level);
  void set_tau(double square) { tau_ = std::max(tau_, square); }
  // A gap of 0.6 rtol: what is left serves kernels nearby, whose bound is this one's and that of the difference.
  double delta() const { return 1.2 * problem_.rtol; }
  void finish();

  const ConvProblem& problem_;
  ConvResult& result_;
  const ConvKernels& kernels_;
  Cells cells_;
  std::vector<int64_t> offsets_;
  int64_t count_;
  int64_t half_;
  int exponent_ = 0;
  std::unique_ptr<Buffer> even_, odd_;
  std::vector<double> traces_, error_, mass_;  // per group: of even parts; of G's entries in norm; ||P||_F^2
  std::unique_ptr<Pool> tests_, tops_;
  Maximum best_;
  double tau_ = 0;    // square of the value that no cell left exceeds
  double floor_ = 0;  // proved lower bound of every Gram matrix's smallest eigenvalue
  std::vector<Cell> stack_;
  std::array<int64_t, 32> tested_{}, passed_{}, skipped_{};
};

template <class Body>
void Search::each(int64_t count, const Body& body) const {
  if (problem_.parallel == nullptr || count <= 1) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  problem_.parallel->run(
      count, [](void* argument, int64_t item) { (*static_cast<const Body*>(argument))(item); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

double Search::gram_bytes() const {
  const double packed = static_cast<double>(kernels_.packed_size(problem_.rows));
  const double table = 2.0 * packed * static_cast<double>(count_ * problem_.groups);
  const double scratch = static_cast<double>(kernels_.panels_size(problem_) + kernels_.square_size(problem_.rows) +
                                             kernels_.test_size(problem_.rows, count_));
  return 8 * (table + scratch);
}

GramTable Search::table(int64_t group) const {
  const int64_t stride = count_ * kernels_.packed_size(problem_.rows) * group;
  return {even_->get() + stride, odd_->get() + stride, problem_.rows, count_};
}

void Search::form_grams(double largest) {
  const int64_t n = problem_.rows, packed = kernels_.packed_size(n);
  even_ = std::make_unique<Buffer>(packed * count_ * problem_.groups);
  odd_ = std::make_unique<Buffer>(packed * count_ * problem_.groups);
  traces_.resize(static_cast<size_t>(count_ * problem_.groups));
  error_.resize(static_cast<size_t>(problem_.groups));
  mass_.resize(static_cast<size_t>(problem_.groups));
  const int64_t taps = problem_.sizes[0] * problem_.sizes[1] * problem_.sizes[2];
  const double relative = std::sqrt(2.0) * (gamma(problem_.cols * taps + n + 2 * count_ + 8) + kPhaseError);
  Pool panels(kernels_.panels_size(problem_)), squares(kernels_.square_size(n));
  const auto form = [&](int64_t group, int64_t j, double* packed_taps) {
    const Pool::Lease square(squares);
    const int64_t at = group * count_ + j;
    kernels_.autocorrelate(problem_, &offsets_[static_cast<size_t>(3 * j)], packed_taps, square.get(),
                           even_->get() + at * packed, odd_->get() + at * packed, &traces_[static_cast<size_t>(at)]);
  };
  const auto prepare = [&](int64_t group, double* packed_taps) {
    double magnitudes[3];
    const Buffer work(2 * problem_.cols);
    kernels_.magnitudes(problem_, exponent_, group, magnitudes, work.get());
    mass_[static_cast<size_t>(group)] = magnitudes[0];
    error_[static_cast<size_t>(group)] = relative * kWiden * magnitudes[0] + kTiny;
    kernels_.pack(problem_, exponent_, group, packed_taps);
  };
  if (problem_.groups == 1) {
    const Pool::Lease lease(panels);
    prepare(0, lease.get());
    each(count_, [&](int64_t j) { form(0, j, lease.get()); });
    return;
  }
  each(problem_.groups, [&](int64_t group) {
    const Pool::Lease lease(panels);
    prepare(group, lease.get());
    for (int64_t j = 0; j < count_; ++j) form(group, j, lease.get());
  });
}

std::vector<double> Search::phases(const Frequency& p) const {
  std::vector<double> out(static_cast<size_t>(2 * count_));
  kernels_.phases(problem_, offsets_.data(), count_, p.data(), out.data());
  return out;
}

double Search::trace(int64_t group, const double* phases) const {
  return kernels_.dot(&traces_[static_cast<size_t>(group * count_)], phases, count_);
}

// The largest eigenvalue is at most the trace.
bool Search::is_below(double trace, double target, int64_t group) const {
  return (trace + error_[static_cast<size_t>(group)]) * (1 + 0x1p-50) <= target;
}

std::vector<double> Search::start_vector() const {
  std::vector<double> x(static_cast<size_t>(2 * half_), 0.0);
  uint64_t state = problem_.seed;
  for (int64_t i = 0; i < 2 * half_; ++i) {  // splitmix64 (Steele, Lea, Flood 2014)
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    if (i % half_ < problem_.rows) x[static_cast<size_t>(i)] = static_cast<double>(z >> 11) * 0x1p-52 - 1;
  }
  const double norm = std::sqrt(kernels_.dot(x.data(), x.data(), 2 * half_));
  for (double& entry : x) entry /= norm;
  return x;
}

double Search::top(Maximum& at, int32_t passes) const {
  const Pool::Lease work(*tops_);
  const auto p = phases(at.p);
  if (at.x.empty()) at.x = start_vector();
  at.value = kernels_.top(table(at.group), p.data(), passes, 0.05 * problem_.rtol, at.x.data(), work.get());
  return at.value;
}

void Search::take(Maximum found) {
  if (found.value > best_.value) best_ = std::move(found);
  set_tau(best_.value * (1 + delta()));
}

// Maximum near `from` of sum_j a_j cos(j.theta) + b_j sin(j.theta): Newton's method, damped until it ascends.
Frequency Search::polynomial_maximum(const std::vector<double>& coefficients, Frequency from, double* value) const {
  const int64_t axes = problem_.axes;
  const auto evaluate = [&](const Frequency& p, double* gradient, double (*hessian)[3]) {
    const auto circle = phases(p);
    double sum = 0;
    for (int64_t j = 0; j < count_; ++j) {
      const double a = coefficients[static_cast<size_t>(j)], b = coefficients[static_cast<size_t>(count_ + j)];
      const double c = circle[static_cast<size_t>(j)], s = circle[static_cast<size_t>(count_ + j)];
      const double term = a * c + b * s, slope = b * c - a * s;
      sum += term;
      if (gradient == nullptr) continue;
      for (int64_t u = 0; u < axes; ++u) {
        const double offset = static_cast<double>(offsets_[static_cast<size_t>(3 * j + u)]);
        gradient[u] += offset * slope;
        for (int64_t v = 0; v < axes; ++v) {
          hessian[u][v] -= offset * static_cast<double>(offsets_[static_cast<size_t>(3 * j + v)]) * term;
        }
      }
    }
    return sum;
  };
  for (int iteration = 0; iteration < 12; ++iteration) {
    double gradient[3] = {}, hessian[3][3] = {};
    const double here = *value = evaluate(from, gradient, hessian);
    double size = 0, slope = 0;
    for (int64_t u = 0; u < axes; ++u) {
      slope += gradient[u] * gradient[u];
      for (int64_t v = 0; v < axes; ++v) size = std::max(size, std::fabs(hessian[u][v]));
    }
    if (!(slope > 1e-20 * here * here)) break;
    bool better = false;
    for (double damping = 0; damping < 1e8 && !better; damping = std::max(10 * damping, 1e-2)) {
      // (damping size - H) step = gradient, by elimination; a negative pivot asks for more damping.
      double m[3][4];
      bool definite = true;
      for (int64_t u = 0; u < axes; ++u) {
        for (int64_t v = 0; v < axes; ++v) m[u][v] = -hessian[u][v] + (u == v ? damping * size + 1e-12 * size : 0);
        m[u][3] = gradient[u];
      }
      for (int64_t u = 0; u < axes && definite; ++u) {
        definite = m[u][u] > 0;
        for (int64_t w = u + 1; w < axes; ++w) {
          const double factor = m[w][u] / m[u][u];
          for (int64_t v = 0; v < 4; ++v) m[w][v] -= factor * m[u][v];
        }
      }
      if (!definite) continue;
      double step[3] = {};
      for (int64_t u = axes - 1; u >= 0; --u) {
        step[u] = m[u][3];
        for (int64_t v = u + 1; v < axes; ++v) step[u] -= m[u][v] * step[v];
        step[u] /= m[u][u];
      }
      Frequency next = from;
      for (int64_t u = 0; u < axes; ++u) {
        const int64_t cycle = frequency_denominator(problem_, u);
        const double limit = 1.0 / static_cast<double>(4 * problem_.sizes[u]);
        const double cycles = std::clamp(step[u] / 6.283185307179586, -limit, limit);
        next[u] = (next[u] + std::llround(cycles * static_cast<double>(cycle))) % cycle;
        if (next[u] < 0) next[u] += cycle;
      }
      if (evaluate(next, nullptr, nullptr) > here) {
        from = next;
        better = true;
      }
    }
    if (!better) break;
  }
  return from;
}

// Alternates between the top vector at a frequency and the best frequency for the vector; never descends. A step
// twice as long is tried first: with the vector held fixed, the frequency moves too little.
Maximum Search::ascend(Maximum from) const {
  top(from, 60);
  if (problem_.on_grid || problem_.axes == 0) return from;
  std::vector<double> coefficients(static_cast<size_t>(2 * count_));
  for (int iteration = 0; iteration < 30; ++iteration) {
    {
      const Pool::Lease work(*tops_);
      kernels_.coefficients(table(from.group), from.x.data(), coefficients.data(), work.get());
    }
    double promised = 0;
    const Frequency p = polynomial_maximum(coefficients, from.p, &promised);
    if (p == from.p) break;
    Maximum far = from;
    for (int64_t a = 0; a < problem_.axes; ++a) {
      const int64_t cycle = frequency_denominator(problem_, a);
      int64_t step = p[a] - from.p[a];
      if (step > cycle / 2) step -= cycle;
      if (step < -cycle / 2) step += cycle;
      far.p[a] = ((p[a] + step) % cycle + cycle) % cycle;
    }
    top(far, 30);
    if (far.value < promised) {
      far = from;
      far.p = p;
      top(far, 30);
    }
    const double gain = far.value - from.value;
    if (gain > 0) from = std::move(far);
    if (!(gain > 0.02 * problem_.rtol * from.value)) break;
  }
  return from;
}

// Where the caller's kernel nearby has its maximum; a little noise keeps every direction within reach.
bool Search::find_start(Maximum& known) const {
  if (problem_.start == nullptr) return false;
  known.group = static_cast<int64_t>(problem_.start[0]);
  for (int64_t a = 0; a < problem_.axes; ++a) {
    const int64_t cycle = frequency_denominator(problem_, a);
    const auto p = std::llround(problem_.start[1 + a] * static_cast<double>(cycle)) % cycle;
    known.p[static_cast<size_t>(a)] = p < 0 ? p + cycle : p;
  }
  known.x = start_vector();
  for (int64_t i = 0; i < problem_.rows; ++i) {
    for (int64_t part = 0; part < 2; ++part) {
      double& entry = known.x[static_cast<size_t>(part * half_ + i)];
      entry = 1e-4 * entry + problem_.start[4 + part * problem_.rows + i];
    }
  }
  const double norm = std::sqrt(kernels_.dot(known.x.data(), known.x.data(), 2 * half_));
  if (!(norm > 0 && norm < INFINITY)) return false;
  for (double& entry : known.x) entry /= norm;
  return true;
}

// A good first value: what the caller knows from a kernel nearby, or the best of the cells with the largest traces.
void Search::estimate() {
  Maximum known;
  if (find_start(known)) {
    take(ascend(std::move(known)));
    return;
  }
  const auto roots = cells_.roots();
  const auto roots_count = static_cast<int64_t>(roots.size());
  struct Candidate {
    double trace;
    int64_t group, root;
  };
  std::vector<std::vector<Candidate>> found(roots.size());
  constexpr size_t kKept = 24;
  const auto order = [](const Candidate& a, const Candidate& b) {
    if (a.trace != b.trace) return a.trace > b.trace;
    return a.group != b.group ? a.group < b.group : a.root < b.root;
  };
  const auto keep = [&](std::vector<Candidate>& list) {
    const size_t kept = std::min(list.size(), kKept);
    std::partial_sort(list.begin(), list.begin() + static_cast<int64_t>(kept), list.end(), order);
    list.resize(kept);
  };
  each(roots_count, [&](int64_t root) {
    const auto circle = phases(roots[static_cast<size_t>(root)]);
    auto& list = found[static_cast<size_t>(root)];
    for (int64_t group = 0; group < problem_.groups; ++group) {
      list.push_back({trace(group, circle.data()), group, root});
    }
    keep(list);
  });
  std::vector<Candidate> candidates;
  for (const auto& list : found) candidates.insert(candidates.end(), list.begin(), list.end());
  keep(candidates);

  std::vector<Maximum> maxima(candidates.size());
  const auto look = [&](size_t i) {
    maxima[i].group = candidates[i].group;
    maxima[i].p = roots[static_cast<size_t>(candidates[i].root)];
    // The largest eigenvalue cannot exceed the trace.
    if (i == 0 || candidates[i].trace > maxima[0].value) top(maxima[i], 12);
  };
  look(0);
  each(static_cast<int64_t>(candidates.size()) - 1, [&](int64_t i) { look(static_cast<size_t>(i) + 1); });
  std::stable_sort(maxima.begin(), maxima.end(), [](const Maximum& a, const Maximum& b) { return a.value > b.value; });
  maxima.resize(std::min<size_t>(maxima.size(), problem_.on_grid ? 1 : 4));
  std::vector<Maximum> ascended(maxima.size());
  each(static_cast<int64_t>(maxima.size()), [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    if (maxima[at].value > 0.8 * maxima[0].value || at == 0) ascended[at] = ascend(maxima[at]);
  });
  for (auto& maximum : ascended) take(std::move(maximum));
}

// A lower bound of cos(2 pi cycles) for cycles in units of 2^-40 below one half: its own rounding is taken off.
double Search::cosine_below(int64_t cycles) const {
  ConvProblem line{};
  line.axes = 1;
  const int64_t one[3] = {1, 0, 0};
  double circle[2];
  kernels_.phases(line, one, 1, &cycles, circle);
  return cycles == 0 ? 1.0 : circle[0] - kPhaseError;
}

// A cell cannot hold a maximum above tau once its Gram matrix's largest eigenvalue is at most this: by Duffin and
// Schaeffer, for values between floor and tau.
double Search::target(int32_t level) const {
  const double cosine = cosine_below(cells_.twice_angle(level));
  return (0.5 * (tau_ + floor_) + 0.5 * (tau_ - floor_) * cosine) * (1 - 16 * kUnitRoundoff);
}

// The shift at which a factorisation proves lambda_max(G) <= bound (sign > 0), or lambda_min(G) >= bound (sign < 0).
double Search::shift(int64_t group, double bound, double sign) const {
  const double gram = error_[static_cast<size_t>(group)];
  const double epsilon = std::sqrt(2.0) * gamma(2 * problem_.rows + 8);
  const double size = sign > 0 ? bound + gram : mass_[static_cast<size_t>(group)] + gram;
  const double factor = epsilon / (1 - epsilon) * static_cast<double>(problem_.rows) + kUnitRoundoff;
  const double trace = sign > 0 ? factor * size : (epsilon / (1 - epsilon) + kUnitRoundoff) * size;
  return bound - sign * (trace + gram + kTiny) * kWiden - sign * 4 * kUnitRoundoff * std::fabs(bound);
}

// Which of the cells satisfy their bound, proved. The cells of one group are tested together.
std::vector<bool> Search::prove(const std::vector<Cell>& cells, const std::vector<double>& bounds, double sign) {
  struct Batch {
    size_t first, count;
    uint32_t mask;
  };
  const auto width = static_cast<size_t>(kernels_.test_width(problem_.rows));
  std::vector<Batch> batches;
  for (size_t i = 0; i < cells.size(); ++i) {
    const bool fits = !batches.empty() && batches.back().count < width && cells[i].group == cells[i - 1].group;
    if (fits) {
      ++batches.back().count;
    } else {
      batches.push_back({i, 1, 0});
    }
  }
  const int64_t entries = 2 * problem_.rows * problem_.rows + 8;
  each(static_cast<int64_t>(batches.size()), [&](int64_t item) {
    Batch& batch = batches[static_cast<size_t>(item)];
    const Pool::Lease work(*tests_);
    const int64_t group = cells[batch.first].group;
    std::vector<double> circle(batch.count * static_cast<size_t>(2 * count_)), shifts(batch.count), limits(batch.count);
    bool possible = true;
    for (size_t i = 0; i < batch.count; ++i) {
      kernels_.phases(problem_, offsets_.data(), count_, cells[batch.first + i].centre.data(),
                      &circle[i * static_cast<size_t>(2 * count_)]);
      shifts[i] = shift(group, bounds[batch.first + i], sign);
      const double room = (bounds[batch.first + i] - error_[static_cast<size_t>(group)]) * (1 - gamma(entries));
      limits[i] = sign > 0 && room > 0 ? room * room * (1 - 4 * kUnitRoundoff) : -1;
      possible = possible && shifts[i] > 0;
    }
    if (!possible) return;
    batch.mask = kernels_.test(table(group),
                               {circle.data(), static_cast<int64_t>(batch.count), shifts.data(), limits.data(), sign},
                               work.get());
  });
  std::vector<bool> proved(cells.size());
  for (const Batch& batch : batches) {
    for (size_t i = 0; i < batch.count; ++i) proved[batch.first + i] = batch.mask >> i & 1;
  }
  result_.cells += static_cast<int64_t>(cells.size());
  return proved;
}

// Flat symbols (dirac, orthogonal): with M and m the extreme eigenvalues over the centres of level 1,
// inf lambda_min >= (M + m)/2 - (M - m)/(2 cos 2D). One cell says whether that is worth while.
void Search::bound_below() {
  if (problem_.on_grid || problem_.axes == 0) return;
  const Cell probe{best_.group, 0, best_.p};
  if (!prove({probe}, {0.5 * best_.value}, -1)[0]) return;
  std::vector<Cell> cells;
  for (const Frequency& root : cells_.roots()) {
    for (const Frequency& p : cells_.children(root, 0)) {
      for (int64_t group = 0; group < problem_.groups; ++group) cells.push_back({group, 1, p});
    }
  }
  if (static_cast<int64_t>(cells.size()) > problem_.max_cells / 4) return;
  std::stable_sort(cells.begin(), cells.end(), [](const Cell& a, const Cell& b) { return a.group < b.group; });
  const auto extreme = [&](double first, double sign) {
    std::vector<Cell> rest = cells;
    double bound = first;
    for (double step = 0.1 * delta() * best_.value; !rest.empty(); step *= 4) {
      const auto proved = prove(rest, std::vector<double>(rest.size(), bound), sign);
      std::vector<Cell> open;
      for (size_t i = 0; i < rest.size(); ++i) {
        if (!proved[i]) open.push_back(rest[i]);
      }
      rest = std::move(open);
      if (rest.empty()) break;
      bound += sign * step;
      if (!(bound > 0) || !(bound < INFINITY)) return 0.0;
    }
    return bound;
  };
  const double smallest = extreme(best_.value * (1 - 0.1 * delta()), -1);
  if (!(smallest > 0.2 * best_.value)) return;
  const double largest = extreme(best_.value * (1 + 0.1 * delta()), 1);
  const double cosine = cosine_below(cells_.twice_angle(1));
  if (!(largest > 0) || !(cosine > 0)) return;
  const double bound = 0.5 * (largest + smallest) - 0.5 * (largest - smallest) / cosine;
  floor_ = std::max(0.0, bound - 16 * kUnitRoundoff * largest / cosine);
}

// Testing a level pays where more than a fifth or so of its cells pass; now and then one is tested to find out.
bool Search::worth_testing(int32_t level) {
  const auto at = static_cast<size_t>(level);
  if (tested_[at] < 8 || 6 * passed_[at] >= tested_[at]) return true;
  return ++skipped_[at] % 16 == 0;
}

void Search::push_children(const Cell& cell) {
  for (const Frequency& p : cells_.children(cell.centre, cell.level)) {
    stack_.push_back({cell.group, cell.level + 1, p});
  }
}

// The cells of a chunk that traces leave open and that are worth a factorisation; others are split at once.
void Search::test_chunk(std::vector<Cell>& chunk, std::vector<Cell>& open) {
  std::vector<char> below(chunk.size());
  each(static_cast<int64_t>(chunk.size() + 31) / 32, [&](int64_t item) {
    for (size_t i = static_cast<size_t>(item) * 32; i < std::min(chunk.size(), static_cast<size_t>(item + 1) * 32);
         ++i) {
      const auto circle = phases(chunk[i].centre);
      below[i] = is_below(trace(chunk[i].group, circle.data()), target(chunk[i].level), chunk[i].group);
    }
  });
  for (size_t i = 0; i < chunk.size(); ++i) {
    if (below[i]) continue;
    const Cell& cell = chunk[i];
    // What fails at the value already found cannot pass; where the cosine is that close to 1 it says more.
    const bool last = !cells_.splits(cell.level) || target(cell.level) >= best_.value;
    if (last || worth_testing(cell.level)) {
      open.push_back(cell);
    } else {
      push_children(cell);
    }
  }
}

// A cell that fails although its target is above the best value: a better one is near its centre.
void Search::refine(const std::vector<Cell>& failed) {
  bool looked = false;
  for (const Cell& cell : failed) {
    if (cells_.splits(cell.level) && target(cell.level) < best_.value) {
      push_children(cell);
      continue;
    }
    if (!looked) {
      looked = true;
      const double before = best_.value;
      Maximum near;
      near.group = cell.group;
      near.p = cell.centre;
      take(ascend(std::move(near)));
      if (best_.value > before) {
        stack_.push_back(cell);
        continue;
      }
    }
    if (cells_.splits(cell.level)) {
      push_children(cell);
    } else {
      set_tau(tau_ * (1 + delta()));  // on a grid, or at the limit of rounding
      stack_.push_back(cell);
    }
  }
}

void Search::branch_and_bound() {
  const size_t chunk_size = problem_.rows <= 128 ? 128 : 32;
  const auto roots = cells_.roots();
  for (const Frequency& root : roots) {
    const auto circle = phases(root);
    for (int64_t group = 0; group < problem_.groups; ++group) {
      if (!is_below(trace(group, circle.data()), target(0), group)) stack_.push_back({group, 0, root});
    }
  }
  std::stable_sort(stack_.begin(), stack_.end(), [](const Cell& a, const Cell& b) { return a.group < b.group; });
  while (!stack_.empty()) {
    if (result_.cells >= problem_.max_cells) return finish();
    const size_t taken = std::min(chunk_size, stack_.size());
    std::vector<Cell> chunk(stack_.end() - static_cast<int64_t>(taken), stack_.end()), open, failed;
    stack_.resize(stack_.size() - taken);
    test_chunk(chunk, open);
    std::vector<double> bounds;
    for (const Cell& cell : open) bounds.push_back(target(cell.level));
    const auto proved = prove(open, bounds, 1);
    for (size_t i = 0; i < open.size(); ++i) {
      const auto level = static_cast<size_t>(open[i].level);
      ++tested_[level];
      passed_[level] += proved[i];
      if (!proved[i]) failed.push_back(open[i]);
    }
    refine(failed);
  }
}

// The budget is spent: tau rises until it covers what is left, cell by cell.
void Search::finish() {
  for (double step = std::max(delta(), 0.01); !stack_.empty();) {
    std::vector<Cell> left;
    std::vector<double> bounds;
    for (const Cell& cell : stack_) {
      const auto circle = phases(cell.centre);
      if (!is_below(trace(cell.group, circle.data()), target(cell.level), cell.group)) left.push_back(cell);
    }
    for (const Cell& cell : left) bounds.push_back(target(cell.level));
    const auto proved = prove(left, bounds, 1);
    stack_.clear();
    for (size_t i = 0; i < left.size(); ++i) {
      if (!proved[i]) stack_.push_back(left[i]);
    }
    if (!stack_.empty()) set_tau(tau_ * (1 + step));
    step *= 2;
  }
}

// S <= min(sqrt(||P||_1 ||P||_inf), ||P||_F) for P = sum_k |W_k|, over the groups.
void Search::run_without_grams() {
  double largest = -1;
  int64_t group = 0;
  const Buffer work(std::max(2 * problem_.cols, kernels_.lower_size(problem_)));
  for (int64_t g = 0; g < problem_.groups; ++g) {
    double out[3];
    kernels_.magnitudes(problem_, exponent_, g, out, work.get());
    const double square = std::min(out[0], out[1] * out[2]) * (1 + 4 * kUnitRoundoff) + kTiny;
    if (square > largest) {
      largest = square;
      group = g;
    }
  }
  tau_ = largest;
  result_.method = ConvUpperMethod::kHolder;
  best_.group = group;
  best_.x = start_vector();
}

void Search::run() {
  double largest = 0;
  result_.cells = 0;
  result_.group = 0;
  result_.method = ConvUpperMethod::kCholesky;
  std::fill(result_.frequency, result_.frequency + 3, 0.0);
  result_.finite = kernels_.examine(problem_, &exponent_, &largest);
  if (!result_.finite) return;
  const int64_t right_half = conv_vector_half(problem_.cols);
  std::vector<double> y(static_cast<size_t>(2 * right_half), 0.0);
  double lower = 0;
  if (largest == 0) {
    best_.x = start_vector();
  } else {
    const bool fits = gram_bytes() <= static_cast<double>(problem_.memory);
    const Buffer work(kernels_.lower_size(problem_));
    Maximum known;
    if (problem_.max_cells == 0 && find_start(known)) {
      // Only a lower value is asked for, and one frequency is enough: a few passes over the taps.
      tau_ = INFINITY;
      best_ = std::move(known);
      lower = kernels_.lower_without_gram(problem_, exponent_, best_.group, best_.p.data(), best_.x.data(), y.data(),
                                          work.get());
    } else if (fits) {
      form_grams(largest);
      tests_ = std::make_unique<Pool>(kernels_.test_size(problem_.rows, count_));
      tops_ = std::make_unique<Pool>(kernels_.top_size(problem_.rows));
      estimate();
      if (problem_.max_cells > 0) {
        bound_below();
        branch_and_bound();
      } else {
        tau_ = INFINITY;
      }
      lower = kernels_.lower(problem_, exponent_, best_.group, best_.p.data(), best_.x.data(), y.data(), work.get());
    } else {
      run_without_grams();
      lower = kernels_.lower_without_gram(problem_, exponent_, best_.group, best_.p.data(), best_.x.data(), y.data(),
                                          work.get());
    }
  }
  const double upper = std::nextafter(std::sqrt(std::nextafter(tau_, INFINITY)), INFINITY);
  const double scaled_up = std::ldexp(upper, exponent_), scaled_down = std::ldexp(lower, exponent_);
  result_.upper = largest == 0 ? 0 : scaled_up < 0x1p-1021 ? std::nextafter(scaled_up, INFINITY) : scaled_up;
  // The largest tap entry is a lower bound without any rounding: it is a mean of symbols.
  const double rounded = scaled_down == INFINITY                      ? 0x1.fffffffffffffp1023
                         : scaled_down < 0x1p-1021 && scaled_down > 0 ? std::nextafter(scaled_down, 0.0)
                                                                      : scaled_down;
  result_.lower = problem_.on_grid ? rounded : std::max(rounded, largest);
  result_.group = best_.group;
  for (int64_t a = 0; a < problem_.axes; ++a) {
    result_.frequency[a] =
        static_cast<double>(best_.p[static_cast<size_t>(a)]) / static_cast<double>(frequency_denominator(problem_, a));
  }
  for (int64_t part = 0; part < 2; ++part) {
    std::copy_n(&best_.x[static_cast<size_t>(part * half_)], problem_.rows, result_.left + part * problem_.rows);
    std::copy_n(&y[static_cast<size_t>(part * right_half)], problem_.cols, result_.right + part * problem_.cols);
  }
}

}  // namespace

void conv_norms(const ConvProblem& problem, ConvResult& result) { Search(problem, result).run(); }

}  // namespace lipfast

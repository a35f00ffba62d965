#include "conv_ascent.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "../random.h"

namespace lipfast {
namespace {

// False where the vector has no direction.
bool normalize(const ConvProblem& problem, std::vector<double>& x) {
  const double norm = std::sqrt(conv_kernels(problem.dtype).dot(x.data(), x.data(), static_cast<int64_t>(x.size())));
  if (!(norm > 0 && norm < INFINITY)) return false;
  for (double& entry : x) entry /= norm;
  return true;
}

int64_t wrapped(int64_t p, int64_t cycle) { return p % cycle < 0 ? p % cycle + cycle : p % cycle; }

// (damping I - hessian) step = gradient, by elimination; false where a pivot is not positive: more damping is needed.
bool newton_step(const double* gradient, const double (*hessian)[3], double damping, double size, int64_t axes,
                 double* step) {
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
  if (!definite) return false;
  for (int64_t u = axes - 1; u >= 0; --u) {
    step[u] = m[u][3];
    for (int64_t v = u + 1; v < axes; ++v) step[u] -= m[u][v] * step[v];
    step[u] /= m[u][u];
  }
  return true;
}

}  // namespace

std::vector<double> conv_start_vector(const ConvProblem& problem) {
  const int64_t half = conv_vector_half(problem.shape.rows);
  std::vector<double> x(static_cast<size_t>(2 * half), 0.0);
  uint64_t state = problem.seed;
  for (int64_t i = 0; i < 2 * half; ++i) {
    const double value = static_cast<double>(random_bits(state)) * 0x1p-52 - 1;
    if (i % half < problem.shape.rows) x[static_cast<size_t>(i)] = value;
  }
  normalize(problem, x);
  return x;
}

bool find_start(const ConvProblem& problem, SymbolMaximum& known) {
  if (problem.start == nullptr) return false;
  const int64_t rows = problem.shape.rows, half = conv_vector_half(rows);
  known.group = static_cast<int64_t>(problem.start[0]);
  for (int64_t a = 0; a < problem.lattice.axes; ++a) {
    const int64_t cycle = problem.lattice.denominators[a];
    const auto p = std::llround(problem.start[1 + a] * static_cast<double>(cycle));
    known.p[static_cast<size_t>(a)] = wrapped(p, cycle);
  }
  known.x = conv_start_vector(problem);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t part = 0; part < 2; ++part) {
      double& entry = known.x[static_cast<size_t>(part * half + i)];
      entry = 1e-4 * entry + problem.start[4 + part * rows + i];
    }
  }
  return normalize(problem, known.x);
}

ConvAscent::ConvAscent(const ConvProblem& problem, const ConvGrams& grams)
    : problem_(problem),
      grams_(grams),
      kernels_(conv_kernels(problem.dtype)),
      tops_(kernels_.top_size(problem.shape.rows)) {}

void ConvAscent::find_top(SymbolMaximum& at, int32_t passes) {
  const WorkspacePool::Lease work(tops_);
  const auto circle = grams_.phases(at.p);
  if (at.x.empty()) at.x = conv_start_vector(problem_);
  at.value = kernels_.top(grams_.table(at.group), circle.data(), passes, 0.05 * problem_.rtol, at.x.data(), work.get());
}

// sum_j a_j cos(j.theta) + b_j sin(j.theta). Adds the derivatives where they are asked for.
double ConvAscent::polynomial(const std::vector<double>& coefficients, const Frequency& p, double* gradient,
                              double (*hessian)[3]) const {
  const int64_t axes = problem_.lattice.axes, count = grams_.count();
  const auto circle = grams_.phases(p);
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    const double a = coefficients[static_cast<size_t>(j)], b = coefficients[static_cast<size_t>(count + j)];
    const double c = circle[static_cast<size_t>(j)], s = circle[static_cast<size_t>(count + j)];
    const double term = a * c + b * s, slope = b * c - a * s;
    sum += term;
    if (gradient == nullptr) continue;
    const int64_t* offset = &grams_.offsets()[static_cast<size_t>(3 * j)];
    for (int64_t u = 0; u < axes; ++u) {
      const double along = static_cast<double>(offset[u]);
      gradient[u] += along * slope;
      for (int64_t v = 0; v < axes; ++v) hessian[u][v] -= along * static_cast<double>(offset[v]) * term;
    }
  }
  return sum;
}

Frequency ConvAscent::moved(Frequency from, const double* step) const {
  for (int64_t u = 0; u < problem_.lattice.axes; ++u) {
    const int64_t cycle = problem_.lattice.denominators[u];
    const double limit = 1.0 / static_cast<double>(4 * problem_.shape.sizes[u]);
    const double cycles = std::clamp(step[u] / 6.283185307179586, -limit, limit);
    from[u] = wrapped(from[u] + std::llround(cycles * static_cast<double>(cycle)), cycle);
  }
  return from;
}

// Maximum of the polynomial near `from`: Newton's method, damped until it ascends.
Frequency ConvAscent::polynomial_maximum(const std::vector<double>& coefficients, Frequency from, double* value) const {
  const int64_t axes = problem_.lattice.axes;
  for (int iteration = 0; iteration < 12; ++iteration) {
    double gradient[3] = {}, hessian[3][3] = {}, step[3] = {};
    const double here = *value = polynomial(coefficients, from, gradient, hessian);
    double size = 0, slope = 0;
    for (int64_t u = 0; u < axes; ++u) {
      slope += gradient[u] * gradient[u];
      for (int64_t v = 0; v < axes; ++v) size = std::max(size, std::fabs(hessian[u][v]));
    }
    if (!(slope > 1e-20 * here * here)) break;
    bool better = false;
    for (double damping = 0; damping < 1e8 && !better; damping = std::max(10 * damping, 1e-2)) {
      if (!newton_step(gradient, hessian, damping, size, axes, step)) continue;
      const Frequency next = moved(from, step);
      if (polynomial(coefficients, next, nullptr, nullptr) > here) {
        from = next;
        better = true;
      }
    }
    if (!better) break;
  }
  return from;
}

// A step twice as long is tried first: with the vector held fixed, the frequency moves too little.
SymbolMaximum ConvAscent::ascend(SymbolMaximum from) {
  find_top(from, 60);
  if (problem_.on_grid || problem_.lattice.axes == 0) return from;
  std::vector<double> coefficients(static_cast<size_t>(2 * grams_.count()));
  for (int iteration = 0; iteration < 30; ++iteration) {
    {
      const WorkspacePool::Lease work(tops_);
      kernels_.coefficients(grams_.table(from.group), from.x.data(), coefficients.data(), work.get());
    }
    double promised = 0;
    const Frequency p = polynomial_maximum(coefficients, from.p, &promised);
    if (p == from.p) break;
    SymbolMaximum far = from;
    for (int64_t a = 0; a < problem_.lattice.axes; ++a) {
      const int64_t cycle = problem_.lattice.denominators[a];
      int64_t step = p[a] - from.p[a];
      if (step > cycle / 2) step -= cycle;
      if (step < -cycle / 2) step += cycle;
      far.p[a] = wrapped(p[a] + step, cycle);
    }
    find_top(far, 30);
    if (far.value < promised) {
      far = from;
      far.p = p;
      find_top(far, 30);
    }
    const double gain = far.value - from.value;
    if (gain > 0) from = std::move(far);
    if (!(gain > 0.02 * problem_.rtol * from.value)) break;
  }
  return from;
}

std::vector<SymbolMaximum> ConvAscent::survey(const std::vector<Frequency>& roots) {
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
  each_item(problem_.parallel, static_cast<int64_t>(roots.size()), [&](int64_t root) {
    const auto circle = grams_.phases(roots[static_cast<size_t>(root)]);
    auto& list = found[static_cast<size_t>(root)];
    for (int64_t group = 0; group < problem_.groups; ++group) {
      list.push_back({grams_.trace(group, circle.data()), group, root});
    }
    keep(list);
  });
  std::vector<Candidate> candidates;
  for (const auto& list : found) candidates.insert(candidates.end(), list.begin(), list.end());
  keep(candidates);

  std::vector<SymbolMaximum> maxima(candidates.size());
  const auto look = [&](size_t i) {
    maxima[i].group = candidates[i].group;
    maxima[i].p = roots[static_cast<size_t>(candidates[i].root)];
    // The largest eigenvalue cannot exceed the trace.
    if (i == 0 || candidates[i].trace > maxima[0].value) find_top(maxima[i], 12);
  };
  look(0);
  each_item(problem_.parallel, static_cast<int64_t>(candidates.size()) - 1,
            [&](int64_t i) { look(static_cast<size_t>(i) + 1); });
  std::ranges::stable_sort(maxima, std::greater{}, &SymbolMaximum::value);
  maxima.resize(std::min<size_t>(maxima.size(), problem_.on_grid ? 1 : 4));
  std::vector<SymbolMaximum> ascended(maxima.size());
  each_item(problem_.parallel, static_cast<int64_t>(maxima.size()), [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    if (maxima[at].value > 0.8 * maxima[0].value || at == 0) ascended[at] = ascend(maxima[at]);
  });
  return ascended;
}

}  // namespace lipfast

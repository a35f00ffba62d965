#include "conv_norms.h"

#include <algorithm>
#include <cmath>

#include "conv_kernels.h"
#include "conv_search.h"

#define LIPFAST_BODY "conv_norms-inl.h"
#include "isa.h"

namespace lipfast {
namespace {

// S^2 <= min(||P||_1 ||P||_inf, ||P||_F^2) for P = sum_k |W_k|, over the groups; `group`: where it is largest.
double holder_square(const ConvProblem& problem, int exponent, double* work, int64_t* group) {
  double largest = -1;
  for (int64_t g = 0; g < problem.groups; ++g) {
    double out[3];
    conv_kernels(problem.dtype).magnitudes(problem, exponent, g, out, work);
    const double square = widened(std::min(out[0], out[1] * out[2]), 4) + kTiny;
    if (square > largest) {
      largest = square;
      *group = g;
    }
  }
  return largest;
}

// A square that S^2 does not exceed, of the taps times 2^-exponent; inf where no upper bound is asked for. best: where
// the lower value `lower` was found; y: its image's direction.
double bracket_square(const ConvProblem& problem, int exponent, ConvResult& result, SymbolMaximum& best, double* y,
                      double* lower) {
  const ConvKernels& kernels = conv_kernels(problem.dtype);
  const Workspace work(std::max(2 * problem.shape.cols, kernels.lower_size(problem)) *
                       static_cast<int64_t>(sizeof(double)));
  const auto without_gram = [&] {
    *lower =
        kernels.lower_without_gram(problem, exponent, best.group, best.p.data(), best.x.data(), y, work.as<double>());
  };
  SymbolMaximum known;
  if (problem.max_cells == 0 && find_start(problem, known)) {
    // Only a lower value is asked for, and one frequency is enough: a few passes over the taps.
    best = std::move(known);
    without_gram();
    return INFINITY;
  }
  ConvGrams grams(problem);
  if (!(grams.bytes() <= static_cast<double>(problem.memory))) {
    result.method = ConvUpperMethod::kHolder;
    const double square = holder_square(problem, exponent, work.as<double>(), &best.group);
    without_gram();
    return square;
  }
  grams.form(exponent);
  ConvCover cover(problem, grams);
  best = ConvSearch(problem, grams, cover).run();
  result.cells = cover.tested();
  *lower = kernels.lower(problem, exponent, best.group, best.p.data(), best.x.data(), y, work.as<double>());
  return cover.is_complete() ? cover.tau() : INFINITY;
}

}  // namespace

const ConvKernels& conv_kernels(Dtype dtype) { return *LIPFAST_DISPATCH(conv_table)(dtype); }

void conv_norms(const ConvProblem& problem, ConvResult& result) {
  int exponent = 0;
  double largest = 0, lower = 0, square = 0;
  result.finite = conv_kernels(problem.dtype).examine(problem, &exponent, &largest);
  if (!result.finite) return;
  const int64_t rows = problem.shape.rows, left_half = conv_vector_half(rows);
  const int64_t cols = problem.shape.cols, right_half = conv_vector_half(cols);
  std::vector<double> y(static_cast<size_t>(2 * right_half), 0.0);
  SymbolMaximum best;
  best.x = conv_start_vector(problem);
  if (largest > 0) square = bracket_square(problem, exponent, result, best, y.data(), &lower);
  result.upper = largest == 0 ? 0 : unscale_up(up(sqrt(up(square))), exponent);
  // The largest tap entry is a lower bound without any rounding: it is a mean of symbols.
  lower = unscale_down(lower, exponent);
  result.lower = problem.on_grid ? lower : std::max(lower, largest);
  result.group = best.group;
  for (int64_t a = 0; a < problem.lattice.axes; ++a) {
    result.frequency[a] =
        static_cast<double>(best.p[static_cast<size_t>(a)]) / static_cast<double>(problem.lattice.denominators[a]);
  }
  for (int64_t part = 0; part < 2; ++part) {
    std::copy_n(&best.x[static_cast<size_t>(part * left_half)], rows, result.left + part * rows);
    std::copy_n(&y[static_cast<size_t>(part * right_half)], cols, result.right + part * cols);
  }
}

}  // namespace lipfast

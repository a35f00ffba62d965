#include "conv_grams.h"

#include <cmath>

namespace lipfast {
namespace {

constexpr auto kDouble = static_cast<int64_t>(sizeof(double));

std::vector<int64_t> positive_offsets(const TapShape& shape) {
  std::vector<int64_t> out;
  const int64_t* k = shape.sizes;
  for (int64_t a = 0; a < k[0]; ++a) {
    for (int64_t b = a > 0 ? 1 - k[1] : 0; b < k[1]; ++b) {
      for (int64_t c = a > 0 || b > 0 ? 1 - k[2] : 0; c < k[2]; ++c) out.insert(out.end(), {a, b, c});
    }
  }
  return out;
}

}  // namespace

ConvGrams::ConvGrams(const ConvProblem& problem)
    : problem_(problem),
      kernels_(conv_kernels(problem.dtype)),
      offsets_(positive_offsets(problem.shape)),
      count_(static_cast<int64_t>(offsets_.size()) / 3) {}

double ConvGrams::bytes() const {
  const int64_t n = problem_.shape.rows;
  const double table =
      2.0 * static_cast<double>(kernels_.packed_size(n)) * static_cast<double>(count_ * problem_.groups);
  const double scratch = static_cast<double>(kernels_.panels_size(problem_.shape) + kernels_.square_size(n) +
                                             kernels_.test_size(n, count_));
  return 8 * (table + scratch);
}

GramTable ConvGrams::table(int64_t group) const {
  const int64_t stride = count_ * kernels_.packed_size(problem_.shape.rows) * group;
  return {even_->as<double>() + stride, odd_->as<double>() + stride, problem_.shape.rows, count_};
}

void ConvGrams::form(int exponent) {
  const int64_t n = problem_.shape.rows, cols = problem_.shape.cols, packed = kernels_.packed_size(n);
  even_ = std::make_unique<Workspace>(packed * count_ * problem_.groups * kDouble);
  odd_ = std::make_unique<Workspace>(packed * count_ * problem_.groups * kDouble);
  traces_.resize(static_cast<size_t>(count_ * problem_.groups));
  error_.resize(static_cast<size_t>(problem_.groups));
  mass_.resize(static_cast<size_t>(problem_.groups));
  // The n is for the trace's own sum.
  const double relative = kRootOfTwo * (gamma(cols * problem_.shape.count() + n + 2 * count_ + 8) + kPhaseError);
  WorkspacePool panels(kernels_.panels_size(problem_.shape)), squares(kernels_.square_size(n));
  const auto form_one = [&](int64_t group, int64_t j, double* packed_taps) {
    const WorkspacePool::Lease square(squares);
    const int64_t at = group * count_ + j;
    kernels_.autocorrelate(problem_.shape, &offsets_[static_cast<size_t>(3 * j)], packed_taps, square.get(),
                           even_->as<double>() + at * packed, odd_->as<double>() + at * packed,
                           &traces_[static_cast<size_t>(at)]);
  };
  const auto prepare = [&](int64_t group, double* packed_taps) {
    double magnitudes[3];
    const Workspace work(2 * cols * kDouble);
    kernels_.magnitudes(problem_, exponent, group, magnitudes, work.as<double>());
    mass_[static_cast<size_t>(group)] = magnitudes[0];
    error_[static_cast<size_t>(group)] = widened(relative) * magnitudes[0] + kTiny;
    kernels_.pack(problem_, exponent, group, packed_taps);
  };
  if (problem_.groups == 1) {
    const WorkspacePool::Lease lease(panels);
    prepare(0, lease.get());
    each_item(problem_.parallel, count_, [&](int64_t j) { form_one(0, j, lease.get()); });
    return;
  }
  each_item(problem_.parallel, problem_.groups, [&](int64_t group) {
    const WorkspacePool::Lease lease(panels);
    prepare(group, lease.get());
    for (int64_t j = 0; j < count_; ++j) form_one(group, j, lease.get());
  });
}

std::vector<double> ConvGrams::phases(const Frequency& p) const {
  std::vector<double> out(static_cast<size_t>(2 * count_));
  kernels_.phases(problem_.lattice, offsets_.data(), count_, p.data(), out.data());
  return out;
}

double ConvGrams::trace(int64_t group, const double* phases) const {
  return kernels_.dot(&traces_[static_cast<size_t>(group * count_)], phases, count_);
}

bool ConvGrams::is_below(double trace, int64_t group, double bound) const {
  return widened(trace + error(group), 8) <= bound;
}

double ConvGrams::shift(int64_t group, double bound, double sign) const {
  const int64_t n = problem_.shape.rows;
  const double factor_error = cholesky_error(kRootOfTwo * gamma(2 * n + 8));
  // Where a factor exists tr A <= n size, or size where the sign turns; no diagonal entry is above size.
  const double size = sign > 0 ? bound + error(group) : mass(group) + error(group);
  const double factor = factor_error * static_cast<double>(n) + kUnitRoundoff;
  const double trace = sign > 0 ? factor * size : (factor_error + kUnitRoundoff) * size;
  return bound - sign * widened(trace + error(group) + kTiny) - sign * 4 * kUnitRoundoff * std::fabs(bound);
}

double ConvGrams::limit(int64_t group, double bound) const {
  const double room = (bound - error(group)) * (1 - gamma(2 * problem_.shape.rows * problem_.shape.rows + 8));
  return room > 0 ? narrowed(room * room, 4) : -1;
}

}  // namespace lipfast

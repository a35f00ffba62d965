#include "conv_cover.h"

#include <algorithm>
#include <cmath>

namespace lipfast {
namespace {

void sort_by_group(std::vector<Cell>& cells) {
  std::stable_sort(cells.begin(), cells.end(), [](const Cell& a, const Cell& b) { return a.group < b.group; });
}

std::vector<Cell> left_of(const std::vector<Cell>& cells, const std::vector<bool>& gone) {
  std::vector<Cell> left;
  for (size_t i = 0; i < cells.size(); ++i) {
    if (!gone[i]) left.push_back(cells[i]);
  }
  return left;
}

}  // namespace

ConvCover::ConvCover(const ConvProblem& problem, const ConvGrams& grams)
    : problem_(problem),
      grams_(grams),
      kernels_(conv_kernels(problem.dtype)),
      cells_(problem),
      tests_(kernels_.test_size(problem.shape.rows, grams.count())) {
  // Of smaller eigenvalues the rounding of Gram matrices leaves nothing, and from 0 no factor leads upwards.
  for (int64_t group = 0; group < problem.groups; ++group) raise(4 * grams.error(group));
}

// A lower bound of cos(2 pi cycles) for cycles in units of 2^-40 below one half: its own rounding is taken off.
double ConvCover::cosine_below(int64_t cycles) const {
  const FrequencyLattice line{1, {kCycle, kCycle, kCycle}};
  const int64_t one[3] = {1, 0, 0};
  double circle[2];
  kernels_.phases(line, one, 1, &cycles, circle);
  return cycles == 0 ? 1.0 : circle[0] - kPhaseError;
}

// By Duffin and Schaeffer, for values between floor and tau.
double ConvCover::target(int32_t level) const {
  const double cosine = cosine_below(cells_.twice_angle(level));
  return narrowed(0.5 * (tau_ + floor_) + 0.5 * (tau_ - floor_) * cosine, 16);
}

void ConvCover::start() {
  for (const Frequency& root : cells_.roots()) {
    const auto circle = grams_.phases(root);
    for (int64_t group = 0; group < problem_.groups; ++group) {
      if (!grams_.is_below(grams_.trace(group, circle.data()), group, target(0))) open_.push_back({group, 0, root});
    }
  }
  sort_by_group(open_);
  started_ = true;
}

void ConvCover::split(const Cell& cell) {
  if (!cells_.splits(cell.level)) return open_.push_back(cell);
  for (const Frequency& p : cells_.children(cell.centre, cell.level)) open_.push_back({cell.group, cell.level + 1, p});
}

// Those that their traces do not exclude: the largest eigenvalue is at most the trace.
std::vector<Cell> ConvCover::above_target(const std::vector<Cell>& cells) const {
  constexpr int64_t kItem = 32;
  const auto count = static_cast<int64_t>(cells.size());
  std::vector<char> below(cells.size());
  each_item(problem_.parallel, (count + kItem - 1) / kItem, [&](int64_t item) {
    for (int64_t at = item * kItem; at < std::min(count, (item + 1) * kItem); ++at) {
      const auto i = static_cast<size_t>(at);
      const auto circle = grams_.phases(cells[i].centre);
      const double trace = grams_.trace(cells[i].group, circle.data());
      below[i] = grams_.is_below(trace, cells[i].group, target(cells[i].level));
    }
  });
  return left_of(cells, {below.begin(), below.end()});
}

// Which of the cells satisfy their bound, proved: lambda_max(G) <= bound at the centre (sign > 0), or lambda_min(G) >=
// bound. The cells of one group are tested together.
std::vector<bool> ConvCover::prove(const std::vector<Cell>& cells, const std::vector<double>& bounds, double sign) {
  struct Batch {
    size_t first, count;
    uint32_t mask;
  };
  const auto width = static_cast<size_t>(kernels_.test_width(problem_.shape.rows));
  std::vector<Batch> batches;
  for (size_t i = 0; i < cells.size(); ++i) {
    const bool fits = !batches.empty() && batches.back().count < width && cells[i].group == cells[i - 1].group;
    if (!fits) batches.push_back({i, 0, 0});
    ++batches.back().count;
  }
  const auto numbers = static_cast<size_t>(2 * grams_.count());
  each_item(problem_.parallel, static_cast<int64_t>(batches.size()), [&](int64_t item) {
    Batch& batch = batches[static_cast<size_t>(item)];
    const WorkspacePool::Lease work(tests_);
    const int64_t group = cells[batch.first].group;
    std::vector<double> circle(batch.count * numbers), shifts(batch.count), limits(batch.count);
    bool possible = true;
    for (size_t i = 0; i < batch.count; ++i) {
      const double bound = bounds[batch.first + i];
      kernels_.phases(problem_.lattice, grams_.offsets().data(), grams_.count(), cells[batch.first + i].centre.data(),
                      &circle[i * numbers]);
      shifts[i] = grams_.shift(group, bound, sign);
      limits[i] = sign > 0 ? grams_.limit(group, bound) : -1;
      possible = possible && shifts[i] > 0;
    }
    if (!possible) return;
    batch.mask = kernels_.test(grams_.table(group),
                               {circle.data(), static_cast<int64_t>(batch.count), shifts.data(), limits.data(), sign},
                               work.get());
  });
  std::vector<bool> proved(cells.size());
  for (const Batch& batch : batches) {
    for (size_t i = 0; i < batch.count; ++i) proved[batch.first + i] = batch.mask >> i & 1;
  }
  tested_ += static_cast<int64_t>(cells.size());
  return proved;
}

std::vector<bool> ConvCover::exclude(const std::vector<Cell>& cells) {
  std::vector<double> bounds;
  for (const Cell& cell : cells) bounds.push_back(target(cell.level));
  return prove(cells, bounds, 1);
}

void ConvCover::advance(size_t count, CellChoices& choices) {
  const auto first = open_.end() - static_cast<int64_t>(std::min(count, open_.size()));
  const std::vector<Cell> chunk(first, open_.end());
  open_.erase(first, open_.end());
  std::vector<Cell> chosen;
  for (const Cell& cell : above_target(chunk)) {
    if (choices.tests(cell)) {
      chosen.push_back(cell);
    } else {
      split(cell);
    }
  }
  const auto excluded = exclude(chosen);
  choices.note(chosen, excluded);
  for (const Cell& cell : left_of(chosen, excluded)) {
    if (choices.splits(cell)) {
      split(cell);
    } else {
      open_.push_back(cell);
    }
  }
}

void ConvCover::sift() {
  const std::vector<Cell> left = above_target(open_);
  open_ = left_of(left, exclude(left));
}

bool ConvCover::is_above(const Cell& cell, double bound) { return prove({cell}, {bound}, -1)[0]; }

// The bound, loosened step by step until it is proved at the centres of all cells: lambda_max(G) <= bound for step > 0,
// else lambda_min(G) >= bound. 0: not proved. A bound that holds at a centre holds when it is looser.
double ConvCover::bound_all(std::vector<Cell> cells, double bound, double step) {
  for (;; step *= 4) {
    cells = left_of(cells, prove(cells, std::vector<double>(cells.size(), bound), step > 0 ? 1 : -1));
    if (cells.empty()) return bound;
    bound += step;
    if (!(bound > 0) || !(bound < INFINITY)) return 0;
  }
}

// With M and m the extreme eigenvalues over the centres of level 1, inf lambda_min >= (M + m)/2 - (M - m)/(2 cos 2D).
void ConvCover::raise_floor(double top, double slack, int64_t most) {
  if (problem_.on_grid || problem_.lattice.axes == 0) return;
  std::vector<Cell> cells;
  for (const Frequency& root : cells_.roots()) {
    for (const Frequency& p : cells_.children(root, 0)) {
      for (int64_t group = 0; group < problem_.groups; ++group) cells.push_back({group, 1, p});
    }
  }
  if (static_cast<int64_t>(cells.size()) > most) return;
  sort_by_group(cells);
  const double smallest = bound_all(cells, top * (1 - slack), -slack * top);
  if (!(smallest > 0.2 * top)) return;  // not worth the second half
  const double largest = bound_all(cells, top * (1 + slack), slack * top);
  const double cosine = cosine_below(cells_.twice_angle(1));
  if (!(largest > 0) || !(cosine > 0)) return;
  const double bound = 0.5 * (largest + smallest) - 0.5 * (largest - smallest) / cosine;
  floor_ = std::max(0.0, bound - 16 * kUnitRoundoff * largest / cosine);
}

}  // namespace lipfast

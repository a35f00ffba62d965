#include "conv_search.h"

#include <algorithm>

namespace lipfast {

ConvSearch::ConvSearch(const ConvProblem& problem, const ConvGrams& grams, ConvCover& cover)
    : problem_(problem), cover_(cover), ascent_(problem, grams) {}

void ConvSearch::take(SymbolMaximum found) {
  if (found.value > best_.value) best_ = std::move(found);
  cover_.raise(best_.value * (1 + delta()));
}

// A good first value: what the caller knows from a kernel nearby, or the best of the cells with the largest traces.
void ConvSearch::estimate() {
  SymbolMaximum known;
  if (find_start(problem_, known)) return take(ascent_.ascend(std::move(known)));
  for (SymbolMaximum& maximum : ascent_.survey(cover_.cells().roots())) take(std::move(maximum));
}

SymbolMaximum ConvSearch::run() {
  estimate();
  if (problem_.max_cells == 0) return best_;
  // Flat symbols (dirac, orthogonal): one cell says whether a floor is worth while.
  const bool flat =
      !problem_.on_grid && problem_.lattice.axes > 0 && cover_.is_above({best_.group, 0, best_.p}, 0.5 * best_.value);
  if (flat) cover_.raise_floor(best_.value, 0.1 * delta(), problem_.max_cells / 4);
  cover_.start();
  while (!cover_.is_complete()) {
    if (cover_.tested() >= problem_.max_cells) {
      spend_no_more();
      break;
    }
    looked_ = false;
    cover_.advance(problem_.shape.rows <= 128 ? 128 : 32, *this);
  }
  return best_;
}

// The budget is spent: tau rises until it covers what is left, cell by cell.
void ConvSearch::spend_no_more() {
  for (double step = std::max(delta(), 0.01); !cover_.is_complete(); step *= 2) {
    cover_.sift();
    if (!cover_.is_complete()) cover_.raise(cover_.tau() * (1 + step));
  }
}

// What fails at the value already found cannot pass; where the cosine is that close to 1 a test says more. Else testing
// a level pays where more than a fifth or so of its cells pass; now and then one is tested to find out.
bool ConvSearch::tests(const Cell& cell) {
  if (!cover_.cells().splits(cell.level) || cover_.target(cell.level) >= best_.value) return true;
  const auto at = static_cast<size_t>(cell.level);
  if (tested_[at] < 8 || 6 * excluded_[at] >= tested_[at]) return true;
  return ++skipped_[at] % 16 == 0;
}

void ConvSearch::note(const std::vector<Cell>& cells, const std::vector<bool>& excluded) {
  for (size_t i = 0; i < cells.size(); ++i) {
    ++tested_[static_cast<size_t>(cells[i].level)];
    excluded_[static_cast<size_t>(cells[i].level)] += excluded[i];
  }
}

// A cell that fails although its target is above the best value: a better one is near its centre.
bool ConvSearch::splits(const Cell& cell) {
  const bool divisible = cover_.cells().splits(cell.level);
  if (divisible && cover_.target(cell.level) < best_.value) return true;
  if (!looked_) {
    looked_ = true;
    const double before = best_.value;
    SymbolMaximum near;
    near.group = cell.group;
    near.p = cell.centre;
    take(ascent_.ascend(std::move(near)));
    if (best_.value > before) return false;
  }
  if (!divisible) cover_.raise(cover_.tau() * (1 + delta()));  // on a grid, or at the limit of rounding
  return divisible;
}

}  // namespace lipfast

// The search of conv_norms: a good lower value first, then branch and bound. It decides in which order the cells of a
// ConvCover are tested and how large tau becomes, nothing else.
#pragma once

#include <algorithm>
#include <array>

#include "conv_ascent.h"
#include "conv_cover.h"

namespace lipfast {

class ConvSearch final : public CellChoices {
 public:
  ConvSearch(const ConvProblem& problem, const ConvGrams& grams, ConvCover& cover);

  // The largest value found; the cover is complete afterwards unless problem.max_cells is 0.
  SymbolMaximum run();

  bool tests(const Cell& cell) override;
  void note(const std::vector<Cell>& cells, const std::vector<bool>& excluded) override;
  bool splits(const Cell& cell) override;

 private:
  // A gap of 0.6 rtol: what is left serves kernels nearby, whose bound is this one's and that of the difference.
  // Less than a few roundings would raise nothing.
  double delta() const { return std::max(1.2 * problem_.rtol, 64 * kUnitRoundoff); }
  void take(SymbolMaximum found);
  void estimate();
  void spend_no_more();

  const ConvProblem& problem_;
  ConvCover& cover_;
  ConvAscent ascent_;
  SymbolMaximum best_;
  bool looked_ = false;                                        // for a better value, since the last chunk
  std::array<int64_t, 32> tested_{}, excluded_{}, skipped_{};  // cells of each level
};

}  // namespace lipfast

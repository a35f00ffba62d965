// What is proved of the supremum of a convolution's symbol: the cells that may still hold a maximum above sqrt(tau).
//
// A cell leaves ConvCover only when it is excluded, by a proof at its centre, or for its children, which cover it. What
// is excluded for one tau is excluded for every larger one, and tau never falls. So once no cell is left S^2 <= tau,
// whatever the choices were. Cells, bounds and shifts: docs/bounds.md.
#pragma once

#include <memory>
#include <vector>

#include "conv_grams.h"

namespace lipfast {

// What a search decides about one cell after another. It may call ConvCover::raise.
struct CellChoices {
  virtual ~CellChoices() = default;
  // Whether a cell that its trace leaves open is worth a factorisation; otherwise it is split.
  virtual bool tests(const Cell& cell) = 0;
  // How the tests of a chunk ended.
  virtual void note(const std::vector<Cell>& cells, const std::vector<bool>& excluded) = 0;
  // Whether a cell whose test failed is split; otherwise it stays to be tested again.
  virtual bool splits(const Cell& cell) = 0;
};

class ConvCover {
 public:
  ConvCover(const ConvProblem& problem, const ConvGrams& grams);

  double tau() const { return tau_; }
  void raise(double tau) { tau_ = tau > tau_ ? tau : tau_; }
  bool is_complete() const { return started_ && open_.empty(); }  // S^2 <= tau is proved
  int64_t tested() const { return tested_; }                      // factorisations asked for
  const Cells& cells() const { return cells_; }

  // A cell of this level cannot hold a maximum above sqrt(tau) once its Gram matrix's largest eigenvalue is at most
  // this.
  double target(int32_t level) const;

  // Opens all cells of level 0 but those that their traces exclude.
  void start();
  // Takes the last `count` open cells, excludes what it can of them, and splits or keeps the others.
  void advance(size_t count, CellChoices& choices);
  // Excludes what it can of all open cells.
  void sift();

  // Whether lambda_min(G) >= bound is proved at the centre of a cell.
  bool is_above(const Cell& cell, double bound);
  // Flat symbols: tries to raise the lower bound of every Gram matrix's smallest eigenvalue, from 0, with at most
  // `most` cells. top: about the largest eigenvalue; slack: by how much of it bounds are loose at first.
  void raise_floor(double top, double slack, int64_t most);

 private:
  double cosine_below(int64_t cycles) const;
  std::vector<Cell> above_target(const std::vector<Cell>& cells) const;
  std::vector<bool> prove(const std::vector<Cell>& cells, const std::vector<double>& bounds, double sign);
  std::vector<bool> exclude(const std::vector<Cell>& cells);
  double bound_all(std::vector<Cell> cells, double bound, double step);
  void split(const Cell& cell);

  const ConvProblem& problem_;
  const ConvGrams& grams_;
  const ConvKernels& kernels_;
  Cells cells_;
  WorkspacePool tests_;
  double tau_ = 0;    // a square
  double floor_ = 0;  // proved: no Gram matrix has a smaller eigenvalue
  int64_t tested_ = 0;
  bool started_ = false;
  std::vector<Cell> open_;
};

}  // namespace lipfast

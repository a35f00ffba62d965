// Cells that cover half of the torus of frequencies (What(-theta) is What(theta)'s conjugate), and their splitting.
//
// One axis: intervals. Two axes: diamonds |x_0|/w_0 + |x_1|/w_1 <= 1, on which sum_a d_a |x_a| is at most
// max_a d_a w_a; boxes inside would be twice as many. Three axes: diamonds times intervals. All numbers are integers
// in units of 2^-40 cycles.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "conv_norms.h"

namespace lipfast {

using Frequency = std::array<int64_t, 3>;

struct Cell {
  int64_t group;
  int32_t level;
  Frequency centre;
};

class Cells {
 public:
  explicit Cells(const ConvProblem& problem);

  // Centres of level 0; on a finite grid, its points.
  std::vector<Frequency> roots() const;
  std::vector<Frequency> children(const Frequency& centre, int32_t level) const;
  // A frequency whose 2 pi multiple is 2 D = 2 max over a cell of sum_a d_a |x_a|; 2^-40 cycles. d_a = (taps - 1)/2.
  int64_t twice_angle(int32_t level) const;
  bool splits(int32_t level) const { return !problem_.on_grid && problem_.lattice.axes > 0 && level < 24; }

 private:
  int64_t width(int64_t axis, int32_t level) const { return widths_[axis] >> level; }
  bool is_own_mirror(const Frequency& p) const;
  bool is_kept(const Frequency& p) const;  // of p and -p, one
  void add(const Frequency& p, bool all, std::vector<Frequency>& out) const;

  const ConvProblem& problem_;
  std::array<int64_t, 3> widths_{};
};

}  // namespace lipfast

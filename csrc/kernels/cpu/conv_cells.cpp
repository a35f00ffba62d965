#include "conv_cells.h"

#include <bit>

namespace lipfast {

// Level 0 has 2 D <= pi/2 on one and two axes, 3 pi/4 on three.
Cells::Cells(const ConvProblem& problem) : problem_(problem) {
  if (problem.on_grid) return;
  for (int64_t a = 0; a < problem.lattice.axes; ++a) {
    const bool interval = problem.lattice.axes == 1 || a == 2;
    const auto least = static_cast<uint64_t>((problem.lattice.axes == 1 ? 2 : 4) * (problem.shape.sizes[a] - 1));
    const auto count = static_cast<int64_t>(std::bit_ceil(least));
    widths_[a] = kCycle / (interval ? 2 * count : count);
  }
}

std::vector<Frequency> Cells::roots() const {
  std::vector<Frequency> out;
  Frequency count{1, 1, 1}, step{0, 0, 0};
  for (int64_t a = 0; a < problem_.lattice.axes; ++a) {
    const bool interval = problem_.lattice.axes == 1 || a == 2;
    step[a] = problem_.on_grid ? 1 : widths_[a] * (interval ? 2 : 1);
    count[a] = problem_.lattice.denominators[a] / step[a];
  }
  const bool diamonds = !problem_.on_grid && problem_.lattice.axes >= 2;
  for (int64_t i = 0; i < count[0]; ++i) {
    for (int64_t j = 0; j < count[1]; ++j) {
      if (diamonds && (i + j) % 2 != 0) continue;
      for (int64_t l = 0; l < count[2]; ++l) add({i * step[0], j * step[1], l * step[2]}, false, out);
    }
  }
  return out;
}

std::vector<Frequency> Cells::children(const Frequency& centre, int32_t level) const {
  std::vector<Frequency> flat, out;
  const bool all = !is_own_mirror(centre);
  const int64_t half0 = width(0, level) / 2;
  if (problem_.lattice.axes == 1) {
    flat = {{centre[0] - half0, 0, 0}, {centre[0] + half0, 0, 0}};
  } else {
    const int64_t half1 = width(1, level) / 2;
    flat = {{centre[0] - half0, centre[1], centre[2]},
            {centre[0] + half0, centre[1], centre[2]},
            {centre[0], centre[1] - half1, centre[2]},
            {centre[0], centre[1] + half1, centre[2]}};
  }
  const int64_t half2 = problem_.lattice.axes == 3 ? width(2, level) / 2 : 0;
  for (const Frequency& p : flat) {
    if (half2 == 0) {
      add(p, all, out);
      continue;
    }
    add({p[0], p[1], p[2] - half2}, all, out);
    add({p[0], p[1], p[2] + half2}, all, out);
  }
  return out;
}

int64_t Cells::twice_angle(int32_t level) const {
  if (problem_.on_grid || problem_.lattice.axes == 0) return 0;
  const auto angle = [&](int64_t a) { return (problem_.shape.sizes[a] - 1) * width(a, level); };
  if (problem_.lattice.axes == 1) return angle(0);
  const int64_t flat = angle(0) > angle(1) ? angle(0) : angle(1);
  return problem_.lattice.axes == 3 ? flat + angle(2) : flat;
}

bool Cells::is_own_mirror(const Frequency& p) const {
  for (int64_t a = 0; a < problem_.lattice.axes; ++a) {
    if (2 * p[a] % problem_.lattice.denominators[a] != 0) return false;
  }
  return true;
}

bool Cells::is_kept(const Frequency& p) const {
  for (int64_t a = 0; a < problem_.lattice.axes; ++a) {
    const int64_t mirror = (problem_.lattice.denominators[a] - p[a]) % problem_.lattice.denominators[a];
    if (p[a] != mirror) return p[a] < mirror;
  }
  return true;
}

void Cells::add(const Frequency& p, bool all, std::vector<Frequency>& out) const {
  Frequency reduced{0, 0, 0};
  for (int64_t a = 0; a < problem_.lattice.axes; ++a) {
    const int64_t q = problem_.lattice.denominators[a];
    reduced[a] = (p[a] % q + q) % q;
  }
  if (all || is_kept(reduced)) out.push_back(reduced);
}

}  // namespace lipfast

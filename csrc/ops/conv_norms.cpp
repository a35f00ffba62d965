// conv_norms: brackets of the suprema of convolutions' symbols. Schema and argument checks.
#include "checks.h"

namespace lipfast {

void check_conv_norms(const std::vector<Tensor>& taps, const std::vector<Tensor>& start,
                      const std::vector<int64_t>& grid) {
  STD_TORCH_CHECK(!taps.empty(), "conv_norms: no kernels");
  STD_TORCH_CHECK(start.size() == taps.size(), "conv_norms: ", start.size(), " starts for ", taps.size(), " kernels");
  STD_TORCH_CHECK(grid.size() == 3 * taps.size(), "conv_norms: expected 3 grid sizes per kernel");
  for (size_t i = 0; i < taps.size(); ++i) {
    const std::string name = "conv_norms: kernel " + std::to_string(i);
    check_dense(taps[i], 6, name);
    STD_TORCH_CHECK(taps[i].numel() > 0, name, ": is empty");
    STD_TORCH_CHECK(taps[i].size(4) <= taps[i].size(5), name, ": expected the smaller side first");
    bool ended = false;
    for (int64_t a = 0; a < 3; ++a) {
      STD_TORCH_CHECK(!ended || taps[i].size(1 + a) == 1, name, ": axes with one tap come last");
      ended = ended || taps[i].size(1 + a) == 1;
      const int64_t points = grid[3 * i + static_cast<size_t>(a)];
      STD_TORCH_CHECK(points >= 0 && points < (int64_t{1} << 31), name, ": expected grid sizes below 2^31");
    }
    if (start[i].numel() == 0) continue;
    const std::string vector = "conv_norms: start " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(start[i], 1, vector) == Dtype::kFloat64, vector, ": expected float64");
    STD_TORCH_CHECK(start[i].size(0) == 4 + 2 * taps[i].size(4), vector, ": expected ", 4 + 2 * taps[i].size(4),
                    " values");
    const double group = values<double>(start[i])[0];
    STD_TORCH_CHECK(group >= 0 && group < static_cast<double>(taps[i].size(0)), vector, ": no such group");
  }
}

// taps: (groups, taps per axis x 3, rows, cols), rows <= cols, axes with one tap last.
// start: empty, or group, frequency (3 numbers, cycles per tap) and vector (real parts, imaginary parts).
// grid: 3 numbers per kernel; all 0: the supremum over all frequencies.
// upper_method: 0 Cholesky, 1 Hoelder; -1: a tap is NaN or infinite.
// left, right: real parts, then imaginary parts of each kernel's singular vectors, one after another.
LIPFAST_SCHEMA(
    "conv_norms(Tensor[] taps, Tensor[] start, int[] grid, float rtol, int max_cells, int seed, int memory) -> "
    "(Tensor lower, Tensor upper, Tensor frequency, Tensor group, Tensor cells, Tensor upper_method, Tensor left, "
    "Tensor right)")

}  // namespace lipfast

// spectral_norms: brackets of the spectral norms of any number of matrices. Schema and argument checks.
#include "checks.h"

namespace lipfast {

constexpr int64_t kMostSide = int64_t{1} << 30;

void check_spectral_norms(const std::vector<Tensor>& matrices, const std::vector<Tensor>& start) {
  STD_TORCH_CHECK(!matrices.empty(), "spectral_norms: no matrices");
  STD_TORCH_CHECK(start.empty() || start.size() == matrices.size(), "spectral_norms: ", start.size(),
                  " start vectors for ", matrices.size(), " matrices");
  for (size_t i = 0; i < matrices.size(); ++i) {
    const std::string name = "spectral_norms: matrix " + std::to_string(i);
    check_dense(matrices[i], 2, name);
    STD_TORCH_CHECK(matrices[i].size(0) < kMostSide && matrices[i].size(1) < kMostSide, name, ": is ",
                    text(matrices[i]), "; roundings are bounded for sides below 2^30");
    STD_TORCH_CHECK(matrices[i].numel() > 0, name, ": is empty");
    if (start.empty() || start[i].numel() == 0) continue;
    const std::string vector = "spectral_norms: start vector " + std::to_string(i);
    STD_TORCH_CHECK(check_dense(start[i], 1, vector) == Dtype::kFloat64, vector, ": expected float64");
    STD_TORCH_CHECK(start[i].size(0) == matrices[i].size(1), vector, ": expected ", matrices[i].size(1), " values");
  }
}

// start: none, or one float64 vector (cols) per matrix, empty for a seeded one.
// upper_method: 0 none, 1 Cholesky, 2 Hoelder; -1: an entry of the matrix is NaN or infinite.
// right, left: the singular vectors one after another.
LIPFAST_SCHEMA(
    "spectral_norms(Tensor[] matrices, Tensor[] start, bool certify, float rtol, int max_passes, bool power, "
    "int seed, int memory) -> (Tensor lower, Tensor upper, Tensor passes, Tensor upper_method, Tensor right, "
    "Tensor left)")

}  // namespace lipfast

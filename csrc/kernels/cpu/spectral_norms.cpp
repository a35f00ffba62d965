#include "spectral_norms.h"

#define LIPFAST_BODY "spectral_norms-inl.h"
#include "isa.h"

namespace lipfast {

bool spectral_norms_uses_gram(const SpectralProblem& problem) {
  const int64_t s = problem.rows < problem.cols ? problem.rows : problem.cols;
  if (s <= 64) return true;  // cheaper than one pass of anything else
  const double bytes = sizeof(double) * static_cast<double>(s) * static_cast<double>(s);
  return problem.certify && bytes <= static_cast<double>(problem.memory);
}

bool spectral_norms_uses_blocks(const SpectralProblem& problem) {
  return problem.rows * problem.cols >= int64_t{4} << 20 && problem.cols >= 64;
}

bool spectral_norms_is_large(const SpectralProblem& problem) {
  const double rows = static_cast<double>(problem.rows), cols = static_cast<double>(problem.cols);
  if (!spectral_norms_uses_gram(problem)) return rows * cols >= 1 << 20;
  return rows * cols * (rows < cols ? rows : cols) >= 5e8;
}

int64_t spectral_norms_workspace(const SpectralProblem& problem) {
  return LIPFAST_DISPATCH(spectral_norms_workspace)(problem);
}

SpectralNormsKernel spectral_norms_kernel(Dtype dtype) { return LIPFAST_DISPATCH(spectral_kernel)(dtype); }

}  // namespace lipfast

#include "spectral_norms.h"

#include "capability.h"

#define LIPFAST_BODY "spectral_norms-inl.h"
#include "isa.h"

namespace lipfast {

bool spectral_norms_uses_gram(const SpectralProblem& problem) {
  const int64_t s = problem.rows < problem.cols ? problem.rows : problem.cols;
  if (s <= 64) return true;  // cheaper than one pass of anything else
  const double bytes = sizeof(double) * static_cast<double>(s) * static_cast<double>(s);
  return problem.certify && bytes <= static_cast<double>(problem.memory);
}

int64_t spectral_norms_workspace(const SpectralProblem& problem) {
  static constexpr int64_t (*table[kCapabilities])(const SpectralProblem&) = LIPFAST_TABLE(spectral_norms_workspace);
  return dispatch(table)(problem);
}

SpectralNormsKernel spectral_norms_kernel() {
  static constexpr SpectralNormsKernel table[kCapabilities] = LIPFAST_TABLE(spectral_norms);
  return dispatch(table);
}

}  // namespace lipfast

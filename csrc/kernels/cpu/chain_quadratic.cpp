#include "chain_quadratic.h"

#define LIPFAST_BODY "chain_quadratic-inl.h"
#include "isa.h"

namespace lipfast {

bool chain_quadratic_is_large(const QuadraticProblem& problem) {
  const double first = static_cast<double>(problem.sizes[1]);
  double products = static_cast<double>(problem.sizes[0]) * first * first / 2;
  for (int64_t i = 1; i < problem.layers; ++i) {
    const double n = static_cast<double>(problem.sizes[i]), next = static_cast<double>(problem.sizes[i + 1]);
    products += n * n * (n / 6 + next / 2) + n * next * next / 2;
  }
  return products >= 5e8;
}

int64_t chain_quadratic_workspace(const QuadraticProblem& problem) {
  return LIPFAST_DISPATCH(chain_quadratic_bytes)(problem);
}

ChainQuadraticKernel chain_quadratic_kernel(Dtype dtype) { return LIPFAST_DISPATCH(chain_quadratic_for)(dtype); }

}  // namespace lipfast

// Body of chain_secants, once per instruction set.
#ifndef LIPFAST_CHAIN_SECANTS_INL_H
#define LIPFAST_CHAIN_SECANTS_INL_H

#include "secant_activation-inl.h"
#include "secant_enclosure-inl.h"
#include "secant_jacobian-inl.h"
#include "secant_line-inl.h"

int64_t secant_workspace(const SecantChain& chain, int64_t points) {
  const int64_t doubles = larger(larger(line_size(chain), jacobian_size(chain)), enclosure_size(chain, points));
  return doubles * static_cast<int64_t>(sizeof(double));
}

ChainSecantsKernel secants_kernel(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return {secant_workspace, jacobian_of<float>, kinks_of<float>, enclose_of<float>};
  return {secant_workspace, jacobian_of<double>, kinks_of<double>, enclose_of<double>};
}

#endif

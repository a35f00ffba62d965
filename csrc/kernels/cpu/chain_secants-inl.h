// Body of chain_secants, once per instruction set.
#ifndef LIPFAST_CHAIN_SECANTS_INL_H
#define LIPFAST_CHAIN_SECANTS_INL_H

#include "secant_activation-inl.h"
#include "secant_enclosure-inl.h"
#include "secant_jacobian-inl.h"
#include "secant_line-inl.h"

LIPFAST_BEGIN

int64_t secant_workspace(const SecantChain& chain, int64_t points) {
  const int64_t doubles = larger(larger(line_size(chain), jacobian_size(chain)), enclosure_size(chain, points));
  return doubles * static_cast<int64_t>(sizeof(double));
}

void secant_jacobian(const SecantChain& chain, int64_t network, const double* x, double* jacobian, double* workspace) {
  if (chain.dtype == Dtype::kFloat32) return jacobian_of<float>(chain, network, x, jacobian, workspace);
  jacobian_of<double>(chain, network, x, jacobian, workspace);
}

void secant_kinks(const SecantChain& chain, int64_t network, const double* x, const double* d, double reach[2],
                  double* workspace) {
  if (chain.dtype == Dtype::kFloat32) return kinks_of<float>(chain, network, x, d, reach, workspace);
  kinks_of<double>(chain, network, x, d, reach, workspace);
}

void secant_enclose(const SecantChain& chain, int64_t network, const double* points, int64_t count, double* values,
                    double* errors, double* workspace) {
  if (chain.dtype == Dtype::kFloat32)
    return enclose_of<float>(chain, network, points, count, values, errors, workspace);
  enclose_of<double>(chain, network, points, count, values, errors, workspace);
}

LIPFAST_END
#endif

// Body of jacobian_reduction, once per instruction set.
#ifndef LIPFAST_JACOBIAN_REDUCTION_INL_H
#define LIPFAST_JACOBIAN_REDUCTION_INL_H

#include "reduce-inl.h"

template <class T>
void jacobian_reduction_of(const JacobianReductionParams& p, int64_t begin, int64_t end, double* work) {
  const int64_t size = p.outputs * p.inputs;
  for (int64_t b = begin; b < end; b += kDoubles) {
    reduce(static_cast<const T*>(p.jacobian) + b * size, p.inputs, smaller<int64_t>(kDoubles, end - b), p.outputs,
           p.inputs, static_cast<T*>(p.spectral) + b, static_cast<T*>(p.frobenius) + b, work);
  }
}

JacobianReductionKernel reduction_kernel(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? jacobian_reduction_of<float> : jacobian_reduction_of<double>;
}

#endif

// What both kernels of chain_secants share: a network's maps, and its activations.
#pragma once

#include "chain_secants.h"
#include "device.cuh"

namespace lipfast::cuda {

template <class T>
struct SecantMap {
  const T *weight, *bias;  // bias: nullptr where there is none
  int rows, cols;
};

template <class T>
__device__ SecantMap<T> map_of(const SecantChains& chains, int64_t network, int l) {
  return {static_cast<const T*>(chains.weights.of(network, chains.layers, l)),
          static_cast<const T*>(chains.biases.of(network, chains.layers, l)), chains.widths[l + 1], chains.widths[l]};
}

__device__ inline double value_of(const PiecewiseLinear& f, double v) {
  if (f.leaky) return v > 0 ? v : v * f.slope;
  const double raised = v < f.low ? f.low : v;
  return raised > f.high ? f.high : raised;
}
__device__ inline double derivative_of(const PiecewiseLinear& f, double v) {
  if (f.leaky) return v > 0 ? 1.0 : f.slope;
  return v > f.low && v < f.high ? 1.0 : 0.0;
}

// A value >= 0 and where it stands.
struct Ranked {
  double value;
  int64_t position;
};
// The larger one comes first, and of equal ones the first position.
__device__ inline bool before(const Ranked& a, const Ranked& b) {
  return a.value > b.value || (a.value == b.value && a.position < b.position);
}

}  // namespace lipfast::cuda

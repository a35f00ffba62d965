// Piecewise-linear activations as one family, and a network's weights in their own type.
#ifndef LIPFAST_SECANT_ACTIVATION_INL_H
#define LIPFAST_SECANT_ACTIVATION_INL_H

#include "vector-inl.h"

// f(v) = min(max(v, low), high), or for LeakyReLU v > 0 ? v : slope v; NaN stays.
struct PiecewiseLinear {
  double low, high;  // the kinks; LeakyReLU: 0, inf
  bool leaky;
  double slope;
  double limit;  // sup |f| where the error rule uses it, otherwise inf

  LIPFAST_INLINE double value(double v) const {
    const double raised = v < low ? low : v;
    const double clipped = raised > high ? high : raised;
    return leaky ? (v > 0 ? v : v * slope) : clipped;
  }
  LIPFAST_INLINE double derivative(double v) const {
    return leaky ? (v > 0 ? 1.0 : slope) : ((v > low) & (v < high) ? 1.0 : 0.0);
  }
};

inline PiecewiseLinear piecewise_linear(const SecantStage& stage) {
  const double infinite = INFINITY;
  switch (stage.activation) {
    case Activation::kLeakyReLU:
      return {0, infinite, true, stage.parameters[0], infinite};
    case Activation::kReLU6:
      return {0, 6, false, 0, 6};
    case Activation::kHardtanh:
      return {stage.parameters[0], stage.parameters[1], false, 0, infinite};
    default:
      return {0, infinite, false, 0, infinite};
  }
}

template <class T>
struct SecantMap {
  const T *weight, *bias;  // bias: nullptr where there is none
  int64_t rows, cols;
};

template <class T>
LIPFAST_INLINE SecantMap<T> map_of(const SecantChain& chain, int64_t network, const SecantStage& stage) {
  const int64_t at = network * chain.affine + stage.affine;
  return {static_cast<const T*>(chain.weights[at]), static_cast<const T*>(chain.biases[at]), stage.out, stage.in};
}

#endif

// Pointwise activations of a chain with autograd's derivatives; formulas and conventions are those of the CPU's.
#pragma once

#include <math.h>

#include "chain_jacobian_norms.h"
#include "device.cuh"

namespace lipfast::cuda {

template <class T>
__device__ T sigmoid(T z) {
  return T(1) / (T(1) + exp(-z));
}

// Strictly between: derivative 1, beyond: 0. NaN stays.
template <class T>
__device__ T clip(T z, T low, T high, T& derivative) {
  derivative = z > low && z < high ? T(1) : T(0);
  return z < low ? low : z > high ? high : z;
}

template <class T>
__device__ T gelu_tanh(T z, T& derivative) {
  const T inner = T(0.7978845608028654) * (z + T(0.044715) * z * z * z);
  const T slope = T(0.7978845608028654) * (T(1) + T(3 * 0.044715) * z * z);
  const T half = sigmoid(2 * inner);
  derivative = half + 2 * z * slope * half * sigmoid(-2 * inner);
  return z * half;
}

// a(z); sets a'(z).
template <class T>
__device__ T evaluate(const ChainActivation& activation, T z, T& derivative) {
  const T first = static_cast<T>(activation.parameters[0]), second = static_cast<T>(activation.parameters[1]);
  switch (activation.function) {
    case Activation::kReLU:
      derivative = z > 0 ? T(1) : T(0);
      return z <= 0 ? T(0) : z;
    case Activation::kLeakyReLU:
      derivative = z > 0 ? T(1) : first;
      return z > 0 ? z : z * first;
    case Activation::kReLU6:
      return clip(z, T(0), T(6), derivative);
    case Activation::kHardtanh:
      return clip(z, first, second, derivative);
    case Activation::kTanh: {
      const T half = exp(-2 * fabs(z)), sum = T(1) + half;
      derivative = 4 * half / (sum * sum);  // 1 - y^2 would cancel
      return tanh(z);
    }
    case Activation::kSigmoid: {
      const T y = sigmoid(z);
      derivative = y * sigmoid(-z);
      return y;
    }
    case Activation::kGELU: {
      const T distribution = T(0.5) * erfc(z * T(-0.7071067811865476));
      derivative = distribution + z * exp(T(-0.5) * z * z) * T(0.3989422804014327);
      return z * distribution;
    }
    case Activation::kGELUTanh:
      return gelu_tanh(z, derivative);
    case Activation::kSiLU: {
      const T y = sigmoid(z);
      derivative = y * (T(1) + z * sigmoid(-z));
      return z * y;
    }
    case Activation::kSoftplus: {
      const bool linear = z * first > second;
      derivative = linear ? T(1) : sigmoid(z * first);
      return linear ? z : log1p(exp(z * first)) / first;
    }
    default:  // kELU
      derivative = z > 0 ? T(1) : first * exp(z);
      return z > 0 ? z : first * expm1(z);
  }
}

}  // namespace lipfast::cuda

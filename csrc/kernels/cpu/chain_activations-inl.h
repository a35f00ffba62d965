// Pointwise activations with autograd's derivatives.
#ifndef LIPFAST_CHAIN_ACTIVATIONS_INL_H
#define LIPFAST_CHAIN_ACTIVATIONS_INL_H

#include "elementary-inl.h"

// h = a(h), factors *= a'(h) for n values. body(vector, derivative) returns the values and sets the derivatives.
template <class T, class Body>
LIPFAST_INLINE void for_values(T* h, T* factors, int64_t n, const Body& body) {
  constexpr int kLanes = Simd<T>::kLanes;
  VectorOf<T> derivative;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(h + i, body(load(h + i), derivative));
    store(factors + i, load(factors + i) * derivative);
  }
  if (i == n) return;
  // What follows belongs to others.
  T rest[kLanes] = {};
  const auto bytes = sizeof(T) * static_cast<size_t>(n - i);
  memcpy(rest, h + i, bytes);
  store(rest, body(load(rest), derivative));
  memcpy(h + i, rest, bytes);
  store(rest, derivative);
  for (int64_t j = 0; i < n; ++i, ++j) factors[i] *= rest[j];
}

template <class T>
void clip(T low, T high, T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  const Vector zero{}, one = splat(T(1)), lowest = splat(low), highest = splat(high);
  for_values(h, factors, n, [=](Vector v, Vector& derivative) {
    derivative = v > lowest ? (v < highest ? one : zero) : zero;
    const Vector bounded = v < lowest ? lowest : v;  // NaN stays
    return bounded > highest ? highest : bounded;
  });
}

template <class T>
void relu(T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  const Vector zero{}, one = splat(T(1));
  for_values(h, factors, n, [=](Vector v, Vector& derivative) {
    derivative = v > 0 ? one : zero;
    return v <= 0 ? zero : v;  // NaN stays
  });
}

template <class T>
void leaky_relu(T slope, T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  const Vector one = splat(T(1)), below = splat(slope);
  for_values(h, factors, n, [=](Vector v, Vector& derivative) {
    derivative = v > 0 ? one : below;
    return v > 0 ? v : v * below;
  });
}

template <class T>
void hyperbolic_tangent(T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  for_values(h, factors, n, [](Vector v, Vector& derivative) {
    const Exponential<T> exponential(2 * minus_magnitude<T>(v));
    const Vector e = exponential.value(), over = 1 / (1 + e), t = exponential.minus_1() * over;
    derivative = 4 * e * over * over;
    return v > 0 ? -t : t;
  });
}

template <class T>
void sigmoid(T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  for_values(h, factors, n, [](Vector v, Vector& derivative) {
    const Logistic<T> s(v);
    derivative = s.value * s.complement;
    return s.value;
  });
}

template <class T>
void gelu(T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  for_values(h, factors, n, [](Vector v, Vector& derivative) {
    // Beyond, e^(-x^2) is 0; infinities must not meet in a quotient.
    const Vector magnitude = -minus_magnitude<T>(v), farthest = splat(T(60));
    const Vector bounded = magnitude > farthest ? farthest : magnitude;
    const Vector e = Exponential<T>(T(-0.5) * bounded * bounded).value();
    const Vector tail = T(0.5) * e * scaled_error_complement<T>(bounded * T(0.70710678118654752440));
    const Vector distribution = v > 0 ? 1 - tail : tail;
    derivative = distribution + v * T(0.39894228040143267794) * e;
    return v * distribution;
  });
}

template <class T>
void gelu_tanh(T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  for_values(h, factors, n, [](Vector v, Vector& derivative) {
    const T factor = T(1.5957691216057307117);  // 2 sqrt(2/pi): (1 + tanh t)/2 is the logistic function of 2 t
    const Vector cubic = T(0.044715) * v * v;
    const Logistic<T> s(factor * v * (1 + cubic));
    derivative = s.value + v * factor * (1 + 3 * cubic) * s.value * s.complement;
    return v * s.value;
  });
}

template <class T>
void silu(T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  for_values(h, factors, n, [](Vector v, Vector& derivative) {
    const Logistic<T> s(v);
    derivative = s.value * (1 + v * s.complement);
    return v * s.value;
  });
}

template <class T>
void softplus(T beta, T threshold, T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  const Vector zero{}, one = splat(T(1));
  for_values(h, factors, n, [=](Vector v, Vector& derivative) {
    const Vector scaled = v * beta, e = Exponential<T>(minus_magnitude<T>(scaled)).value(), over = 1 / (1 + e);
    const Vector slope = scaled < 0 ? e * over : over;
    const Vector value = ((scaled > 0 ? scaled : zero) + logarithm_of_1_plus<T>(e)) / beta;
    derivative = scaled > threshold ? one : slope;
    return scaled > threshold ? v : value;
  });
}

template <class T>
void elu(T alpha, T* h, T* factors, int64_t n) {
  typedef VectorOf<T> Vector;
  const Vector one = splat(T(1));
  for_values(h, factors, n, [=](Vector v, Vector& derivative) {
    const Exponential<T> exponential(minus_magnitude<T>(v));
    derivative = v > 0 ? one : alpha * exponential.value();
    return v > 0 ? v : alpha * exponential.minus_1();
  });
}

template <class T>
void activate(const ChainStage& stage, T* h, T* factors, int64_t n) {
  const T first = static_cast<T>(stage.parameters[0]), second = static_cast<T>(stage.parameters[1]);
  switch (stage.activation) {
    case Activation::kReLU:
      return relu(h, factors, n);
    case Activation::kLeakyReLU:
      return leaky_relu(first, h, factors, n);
    case Activation::kReLU6:
      return clip(T(0), T(6), h, factors, n);
    case Activation::kHardtanh:
      return clip(first, second, h, factors, n);
    case Activation::kTanh:
      return hyperbolic_tangent(h, factors, n);
    case Activation::kSigmoid:
      return sigmoid(h, factors, n);
    case Activation::kGELU:
      return gelu(h, factors, n);
    case Activation::kGELUTanh:
      return gelu_tanh(h, factors, n);
    case Activation::kSiLU:
      return silu(h, factors, n);
    case Activation::kSoftplus:
      return softplus(first, second, h, factors, n);
    case Activation::kELU:
      return elu(first, h, factors, n);
  }
}

// Whether every derivative is 0 or 1.
LIPFAST_INLINE bool is_selecting(const ChainStage& stage) {
  return stage.activation == Activation::kReLU || stage.activation == Activation::kReLU6 ||
         stage.activation == Activation::kHardtanh;
}

#endif

// Pointwise activations with autograd's derivatives. Functions of the C library are called, never instantiated.

LIPFAST_INLINE float exponential(float v) { return __builtin_expf(v); }
LIPFAST_INLINE double exponential(double v) { return __builtin_exp(v); }
LIPFAST_INLINE float exponential_minus_1(float v) { return __builtin_expm1f(v); }
LIPFAST_INLINE double exponential_minus_1(double v) { return __builtin_expm1(v); }
LIPFAST_INLINE float logarithm_of_1_plus(float v) { return __builtin_log1pf(v); }
LIPFAST_INLINE double logarithm_of_1_plus(double v) { return __builtin_log1p(v); }
LIPFAST_INLINE float hyperbolic_tangent(float v) { return __builtin_tanhf(v); }
LIPFAST_INLINE double hyperbolic_tangent(double v) { return __builtin_tanh(v); }
LIPFAST_INLINE float error_complement(float v) { return __builtin_erfcf(v); }
LIPFAST_INLINE double error_complement(double v) { return __builtin_erfc(v); }

// s(v) and s(-v) without cancellation.
template <class T>
struct Logistic {
  T value, complement;
  explicit LIPFAST_INLINE Logistic(T v) {
    const T e = exponential(v < 0 ? v : -v), small = e / (1 + e), large = 1 / (1 + e);
    value = v < 0 ? small : large;
    complement = v < 0 ? large : small;
  }
};

// h = a(h), factors *= a'(h) for n values; body(value, derivative) replaces the value and sets the derivative.
template <class T, class Body>
LIPFAST_INLINE void for_values(T* h, T* factors, int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; ++i) {
    T derivative;
    h[i] = body(h[i], derivative);
    factors[i] *= derivative;
  }
}

template <class T>
void piecewise_linear(T low, T high, T* h, T* factors, int64_t n) {
  for_values(h, factors, n, [=](T v, T& derivative) {
    derivative = v > low && v < high ? T(1) : T(0);
    return v < low ? low : (v > high ? high : v);  // NaN stays
  });
}

template <class T>
void gelu(T* h, T* factors, int64_t n) {
  for_values(h, factors, n, [](T v, T& derivative) {
    const T distribution = T(0.5) * error_complement(-v * T(0.70710678118654752440));
    derivative = distribution + v * T(0.39894228040143267794) * exponential(T(-0.5) * v * v);
    return v * distribution;
  });
}

template <class T>
void gelu_tanh(T* h, T* factors, int64_t n) {
  for_values(h, factors, n, [](T v, T& derivative) {
    const T factor = T(1.5957691216057307117);  // 2 sqrt(2/pi): (1 + tanh t)/2 is the logistic function of 2 t
    const T cubic = T(0.044715) * v * v;
    const Logistic<T> s(factor * v * (1 + cubic));
    derivative = s.value + v * factor * (1 + 3 * cubic) * s.value * s.complement;
    return v * s.value;
  });
}

template <class T>
void softplus(T beta, T threshold, T* h, T* factors, int64_t n) {
  for_values(h, factors, n, [=](T v, T& derivative) {
    const T scaled = v * beta;
    if (scaled > threshold) {
      derivative = 1;
      return v;
    }
    const T magnitude = scaled < 0 ? scaled : -scaled;
    derivative = Logistic<T>(scaled).value;
    return ((scaled > 0 ? scaled : T(0)) + logarithm_of_1_plus(exponential(magnitude))) / beta;
  });
}

template <class T>
void activate(const ChainStage& stage, T* h, T* factors, int64_t n) {
  const T first = static_cast<T>(stage.parameters[0]), second = static_cast<T>(stage.parameters[1]);
  switch (stage.activation) {
    case Activation::kReLU:
      for_values(h, factors, n, [](T v, T& derivative) {
        derivative = v > 0 ? T(1) : T(0);
        return v <= 0 ? T(0) : v;  // NaN stays
      });
      break;
    case Activation::kLeakyReLU:
      for_values(h, factors, n, [=](T v, T& derivative) {
        derivative = v > 0 ? T(1) : first;
        return v > 0 ? v : v * first;
      });
      break;
    case Activation::kReLU6:
      piecewise_linear(T(0), T(6), h, factors, n);
      break;
    case Activation::kHardtanh:
      piecewise_linear(first, second, h, factors, n);
      break;
    case Activation::kTanh:
      for_values(h, factors, n, [](T v, T& derivative) {
        const Logistic<T> s(2 * v);
        derivative = 4 * s.value * s.complement;
        return hyperbolic_tangent(v);
      });
      break;
    case Activation::kSigmoid:
      for_values(h, factors, n, [](T v, T& derivative) {
        const Logistic<T> s(v);
        derivative = s.value * s.complement;
        return s.value;
      });
      break;
    case Activation::kGELU:
      gelu(h, factors, n);
      break;
    case Activation::kGELUTanh:
      gelu_tanh(h, factors, n);
      break;
    case Activation::kSiLU:
      for_values(h, factors, n, [](T v, T& derivative) {
        const Logistic<T> s(v);
        derivative = s.value * (1 + v * s.complement);
        return v * s.value;
      });
      break;
    case Activation::kSoftplus:
      softplus(first, second, h, factors, n);
      break;
    case Activation::kELU:
      for_values(h, factors, n, [=](T v, T& derivative) {
        if (v > 0) {
          derivative = 1;
          return v;
        }
        derivative = first * exponential(v);
        return first * exponential_minus_1(v);
      });
      break;
  }
}

// Whether every derivative is 0 or 1.
LIPFAST_INLINE bool is_selecting(const ChainStage& stage) {
  return stage.activation == Activation::kReLU || stage.activation == Activation::kReLU6 ||
         stage.activation == Activation::kHardtanh;
}

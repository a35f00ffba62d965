// Small functions of single numbers that the kernels of every device use.
#pragma once

#include <cmath>

#include "params.h"

namespace lipfast {

template <class T>
LIPFAST_SHARED T larger(T a, T b) {
  return a < b ? b : a;
}
template <class T>
LIPFAST_SHARED T smaller(T a, T b) {
  return b < a ? b : a;
}
LIPFAST_SHARED int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Multiplication by 2^e in two exact steps, for exponents that no single power of two can hold.
struct PowerOfTwo {
  double first, second;
  LIPFAST_SHARED double operator()(double value) const { return value * first * second; }
};
LIPFAST_SHARED PowerOfTwo power_of_two(int exponent) {
  return {ldexp(1.0, exponent / 2), ldexp(1.0, exponent - exponent / 2)};
}

}  // namespace lipfast

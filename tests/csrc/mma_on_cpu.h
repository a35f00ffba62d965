// Tensor cores on a CPU: mma.sync.aligned.m16n8k8 for TF32, by the layout of fragments that the PTX ISA documents.
//
// Where the ISA leaves arithmetic open, the worst that was seen of devices (Fasi, Higham, Mikaitis and Pranesh 2021):
// products are exact; four of them and the sum so far are cut off at the last bit of the largest, added up, and cut off
// again. Worse than any: numbers below 2^-126 are 0, whether factors, products or sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

inline double without_subnormals(double value) { return std::fabs(value) < 0x1p-126 ? 0.0 : value; }
inline double tf32(uint32_t bits) { return without_subnormals(from_bits<float>(bits & 0xFFFFE000u)); }

// Towards zero.
inline float cut_off(double value) {
  if (!(std::fabs(value) <= std::numeric_limits<float>::max())) return static_cast<float>(value);
  const auto nearest = static_cast<float>(value);
  return static_cast<float>(
      without_subnormals(std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest));
}

inline float add_four(float sum, const double (&products)[4]) {
  double top = std::fabs(sum), total = sum;
  for (const double product : products) {
    top = std::fmax(top, std::fabs(product));
    total += product;
  }
  if (top == 0 || !std::isfinite(total)) return static_cast<float>(total);
  const double last = std::ldexp(1.0, std::ilogb(top) - 23);
  total = last * std::trunc(sum / last);
  for (const double product : products) total += last * std::trunc(product / last);
  return cut_off(total);
}

}  // namespace cuda_on_cpu

namespace lipfast::cuda {

inline void multiply_tf32(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4]) {
  const unsigned lane = cuda_on_cpu::thread_index().x % 32, group = lane / 4, member = lane % 4;
  const cuda_on_cpu::Unwatched shim;  // after the index, which ends a watch of its own
  uint64_t left[2][32], right[32];    // two registers of every lane
  const auto exchange = [](uint32_t first, uint32_t second, uint64_t (&out)[32]) {
    cuda_on_cpu::Machine::instance().exchange("mma.sync", 0xFFFFFFFFu, first | uint64_t{second} << 32, out);
  };
  exchange(a[0], a[1], left[0]);
  exchange(a[2], a[3], left[1]);
  exchange(b[0], b[1], right);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * member + i % 2;
    for (unsigned half = 0; half < 2; ++half) {
      double products[4];
      for (unsigned k = 0; k < 4; ++k) {
        const auto of_a = static_cast<uint32_t>(left[half][4 * group + k] >> 32 * (i / 2));
        const auto of_b = static_cast<uint32_t>(right[4 * column + k] >> 32 * half);
        products[k] = cuda_on_cpu::without_subnormals(cuda_on_cpu::tf32(of_a) * cuda_on_cpu::tf32(of_b));
      }
      sums[i] = cuda_on_cpu::add_four(sums[i], products);
    }
  }
}

}  // namespace lipfast::cuda

// Products of float32 by tensor cores, which take TF32: float32's exponents and 11 bits. Each factor is a large part
// and a small one, and three of their four products are added up (Ootomo and Yokota 2022).
#pragma once

#include "device.cuh"

#if defined(LIPFAST_CUDA_ON_CPU)
#include "mma_on_cpu.h"
#else
namespace lipfast::cuda {

// sums (16 x 8) += a (16 x 8) b (8 x 8) by a whole warp; fragments as the PTX ISA lays out mma.m16n8k8 for .tf32. The
// 13 low bits of a and b are ignored.
__device__ __forceinline__ void multiply_tf32(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace lipfast::cuda
#endif

namespace lipfast::cuda {

// Fragments of a matrix: the nearest TF32 numbers, and what they lack. Of a normal number's 24 bits the two hold all,
// or all but the last one: the difference has 12 bits and a sign. It is lost where it is below float32's normal
// numbers.
template <int kSize>
struct Fragment {
  uint32_t large[kSize], small[kSize];

  __device__ __forceinline__ void set(int i, float value) {
    large[i] = (__float_as_uint(value) + 0x1000u) & 0xFFFFE000u;
    small[i] = __float_as_uint(value - __uint_as_float(large[i]));
  }
};

// sums += a b: to about 2^-22 of each product, apart from how sums are rounded: tensor cores cut off.
__device__ __forceinline__ void multiply_float32(const Fragment<4>& a, const Fragment<2>& b, float (&sums)[4]) {
  multiply_tf32(a.small, b.large, sums);
  multiply_tf32(a.large, b.small, sums);
  multiply_tf32(a.large, b.large, sums);
}

}  // namespace lipfast::cuda

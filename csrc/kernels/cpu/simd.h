// Vectors for the kernel bodies (-inl.h), which are compiled once per instruction set.
//
// A body includes the bodies that it uses and nothing else: isa_pass.h includes it in an anonymous namespace of the
// instruction set, under the compiler's target pragma (isa.h). What bodies use of other headers is included here, that
// of one op in its .cpp. Hazards:
//  * a body must not include or instantiate anything of the standard library: an inline function that two
//    instruction sets share would be merged by the linker, and the baseline copy would then run AVX code.
//    <cmath>'s builtins (sqrt, fabs, ldexp, frexp) on double are fine;
//  * products and sums may be contracted to fused multiply-adds: error bounds may use that only in the
//    direction in which it helps (fewer roundings).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../random.h"
#include "../rounding.h"
#include "../scalar.h"
#include "taps.h"

#if defined(__clang__)
#define LIPFAST_PRAGMA(text) _Pragma(#text)
#define LIPFAST_TARGET_PUSH(features) \
  LIPFAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LIPFAST_TARGET_POP LIPFAST_PRAGMA(clang attribute pop)
#define LIPFAST_UNROLL LIPFAST_PRAGMA(clang loop unroll(full))
#else
#define LIPFAST_PRAGMA(text) _Pragma(#text)
#define LIPFAST_TARGET_PUSH(features) LIPFAST_PRAGMA(GCC push_options) LIPFAST_PRAGMA(GCC target(features))
#define LIPFAST_TARGET_POP LIPFAST_PRAGMA(GCC pop_options)
#define LIPFAST_UNROLL LIPFAST_PRAGMA(GCC unroll 16)
#endif

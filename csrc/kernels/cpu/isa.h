// Includes LIPFAST_BODY once per instruction set, each in a namespace of its own. One stem includes this once.
// "default" is what the compiler targets anyway (SSE2 on x86-64, NEON on arm64), through vectors of 16 bytes. It comes
// first: what a body includes of other headers is compiled then, for every processor.
#include "capability.h"
#include "simd.h"

#define LIPFAST_ISA isa_default
#define LIPFAST_VECTOR_BYTES 16
#include "isa_pass.h"

#if defined(__x86_64__)
#define LIPFAST_ISA isa_avx2
#define LIPFAST_VECTOR_BYTES 32
LIPFAST_TARGET_PUSH("avx2,fma")
#include "isa_pass.h"
LIPFAST_TARGET_POP

#define LIPFAST_ISA isa_avx512
#define LIPFAST_VECTOR_BYTES 64
LIPFAST_TARGET_PUSH("avx512f,avx512dq,avx512vl,avx2,fma")
#include "isa_pass.h"
LIPFAST_TARGET_POP

#define LIPFAST_DISPATCH(function) dispatch({isa_default::function, isa_avx2::function, isa_avx512::function})
#else
#define LIPFAST_DISPATCH(function) dispatch({isa_default::function})
#endif

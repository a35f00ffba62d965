// Includes LIPFAST_BODY once per instruction set, each in a namespace of its own. One stem includes this once.
// "default" is what the compiler targets anyway (SSE2 on x86-64, NEON on arm64), through vectors of 16 bytes.
#include "simd.h"

#define LIPFAST_VECTOR_BYTES 16
namespace lipfast::isa_default {
namespace {
#include "vector-inl.h"
#include LIPFAST_BODY
}  // namespace
}  // namespace lipfast::isa_default
#undef LIPFAST_VECTOR_BYTES

#if defined(__x86_64__)
#define LIPFAST_VECTOR_BYTES 32
LIPFAST_TARGET_PUSH("avx2,fma")
namespace lipfast::isa_avx2 {
namespace {
#include "vector-inl.h"
#include LIPFAST_BODY
}  // namespace
}  // namespace lipfast::isa_avx2
LIPFAST_TARGET_POP
#undef LIPFAST_VECTOR_BYTES

#define LIPFAST_VECTOR_BYTES 64
LIPFAST_TARGET_PUSH("avx512f,avx512dq,avx512vl,avx2,fma")
namespace lipfast::isa_avx512 {
namespace {
#include "vector-inl.h"
#include LIPFAST_BODY
}  // namespace
}  // namespace lipfast::isa_avx512
LIPFAST_TARGET_POP
#undef LIPFAST_VECTOR_BYTES

#define LIPFAST_TABLE(function) {isa_default::function, isa_avx2::function, isa_avx512::function}
#else
#define LIPFAST_TABLE(function) {isa_default::function, nullptr, nullptr}
#endif

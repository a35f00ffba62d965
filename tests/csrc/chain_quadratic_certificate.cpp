// The certificate of chain_quadratic alone, for multipliers and a rho^2 that a test chooses.
#include <cmath>
#include <new>

#include "kernels/cpu/chain_quadratic.h"
#include "kernels/cpu/simd.h"

// Terms that tests/csrc/test_chain_quadratic_certificate.py leaves out, one at a time.
static int left_out = -1;
inline double kept(int term) { return term == left_out ? 0 : 1; }
extern "C" __attribute__((visibility("default"))) void leave_out(int term) { left_out = term; }

#define LIPFAST_ISA isa_default
#define LIPFAST_VECTOR_BYTES 16
#define LIPFAST_BODY "chain_quadratic-inl.h"
#include "kernels/cpu/isa_pass.h"

using namespace lipfast;

// Whether rho^2 is proved. layers matrices; hidden layers' means, products and multipliers; no exponents.
extern "C" __attribute__((visibility("default"))) int proves(int64_t layers, const int64_t* sizes,
                                                             const void* const* weights, const double* const* errors,
                                                             const double* const* means, const double* const* products,
                                                             double* const* multipliers, double square) {
  const QuadraticProblem problem{layers, sizes, weights, errors, means, products, nullptr, 0, nullptr, nullptr};
  isa_default::Arena count(nullptr);
  isa_default::ChainCertificate sized(problem, count);
  int64_t units = 0;
  for (int64_t i = 0; i <= layers; ++i) units += sizes[i];
  char* memory = new (std::align_val_t{64}) char[static_cast<size_t>(count.used())];
  auto* zeros = new int32_t[static_cast<size_t>(units)]();
  auto** exponents = new int32_t*[static_cast<size_t>(layers)];
  for (int64_t i = 0; i < layers; ++i) exponents[i] = zeros;
  isa_default::Arena arena(memory);
  isa_default::ChainCertificate certificate(problem, arena);
  certificate.unit = exponents;
  certificate.shifts = zeros;
  certificate.d = multipliers;
  const bool proved = certificate.factor_hidden<double>(square) && certificate.prove(square);
  delete[] exponents;
  delete[] zeros;
  ::operator delete[](memory, std::align_val_t{64});
  return proved ? 1 : 0;
}

// clang-format off
// chain_quadratic: certified Lipschitz constant of a chain of matrices and activations by quadratic constraints.
//
// Types        float32 or float64 weights, converted exactly; slopes' means and products and bounds of errors float64;
//              the search in float32 (float64 where that breaks), the certificate in float64.
// Value        2^(sum of exponents) sqrt(rho^2), rounded up, for a rho^2 with which the lowered matrix (5) was factored:
//              never below the truth, whatever the search found. +inf: nothing was proved.
// Proof        docs/bounds.md, "Quadratic constraints of a chain"; of the code chain_quadratic_certificate-inl.h,
//              chain_quadratic_panels-inl.h and the packing of chain_quadratic_balance-inl.h. The rest is choice.
// Errors       no exceptions; a network with NaN or infinite weights, means or products gets +inf.
// Threads      one network is one thread's, or all threads' (`parallel`), with the same bits.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast {

// Asked before every step of a kernel's work, a layer of a sweep: true ends it, with nothing found.
struct Stop {
  bool (*asked)(void* argument);
  void* argument;
};

// One network: matrices W_1 .. W_L, row-major, sizes[i] x sizes[i - 1].
struct QuadraticProblem {
  int64_t layers;                 // L >= 2
  const int64_t* sizes;           // L + 1, inputs first
  const void* const* weights;     // L
  const double* const* errors;    // L, each as its weight or nullptr: elementwise bounds of errors
  const double* const* means;     // L - 1, sizes[i + 1] each
  const double* const* products;  // L - 1, alike
  const double* const* start;     // L - 1, log2 of multipliers in original units; nullptr: none
  int64_t evaluations;
  const Parallel* parallel;  // nullptr: this thread does everything
  const Stop* stop;          // nullptr: nobody ends it
};

struct QuadraticResult {
  double log_value, value, square;
  int32_t evaluations;
  bool tried;                  // whether the multipliers were, before the certificate
  double* const* multipliers;  // L - 1, sizes[i + 1] each
  double* const* logs;         // log2 of them in original units
  int32_t* const* unit_exponents;
  int32_t* weight_exponents;  // L
};

using ChainQuadraticKernel = void (*)(const QuadraticProblem&, QuadraticResult&, void* workspace);

ChainQuadraticKernel chain_quadratic_kernel(Dtype dtype);

// Bytes that a network of these sizes needs, for every capability.
int64_t chain_quadratic_workspace(const QuadraticProblem& problem);

// Whether all threads should share one network.
bool chain_quadratic_is_large(const QuadraticProblem& problem);

}  // namespace lipfast

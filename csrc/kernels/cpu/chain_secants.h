// clang-format off
// chain_secants: what a certified secant needs of one network that is a chain of linear maps and piecewise-linear
// activations: Jacobian at a sample, distances to the kinks along a line, and values at points with error bounds.
//
// Types        float32 or float64 for weights and biases, read as they are and converted exactly; all else float64.
// Error        Jacobian and distances: that of a float64 evaluation, nothing is proved. Enclosure:
//
//                |f(p) - value| <= error  elementwise, in real arithmetic, for every stored point p;
//
//              docs/bounds.md has the bounds and their proof. An overflow on the way gives the error inf.
// Conventions  autograd's: derivative 0 at both ends of a clipped range (so relu'(0) = 0), slope at 0 for LeakyReLU.
// Errors       none: NaN and infinities pass through, with the error inf.
// Threads      one network is one thread's. Round to nearest and denormals are assumed: see StandardArithmetic.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast {

struct SecantStage {
  bool linear;
  Activation activation;  // otherwise: kReLU, kLeakyReLU, kReLU6 or kHardtanh
  double parameters[2];
  int64_t affine;  // linear: index among the weights
  int64_t in, out;
};

// Networks of the same stages and shapes; at least one stage is linear.
struct SecantChain {
  int64_t count;
  const SecantStage* stages;
  int64_t affine;
  int64_t inputs, outputs, widest;  // widest: units between two stages, inputs and outputs included
  const void* const* weights;       // networks * affine, (out, in)
  const void* const* biases;        // networks * affine, nullptr: no bias
};

struct ChainSecantsKernel {
  // Bytes that the functions below need, the last one for this number of points.
  int64_t (*workspace)(const SecantChain&, int64_t points);
  // jacobian: (outputs, inputs).
  void (*jacobian)(const SecantChain&, int64_t network, const double* x, double* jacobian, double* workspace);
  // reach: t for which x - t d and x + t d meet the first kinks, inf where there are none; a unit that does not move
  // along d has none.
  void (*kinks)(const SecantChain&, int64_t network, const double* x, const double* d, double reach[2],
                double* workspace);
  // points: (count, inputs); values, errors: (count, outputs).
  void (*enclose)(const SecantChain&, int64_t network, const double* points, int64_t count, double* values,
                  double* errors, double* workspace);
};

// For this type of weights and biases.
ChainSecantsKernel chain_secants_kernel(Dtype dtype);

}  // namespace lipfast

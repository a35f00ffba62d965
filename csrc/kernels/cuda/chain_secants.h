// clang-format off
// chain_secants on CUDA: certified secants of many networks, each a chain of linear maps and piecewise-linear
// activations, in two kernels: points on a line through a sample of each, and the best proved quotient of their values.
//
// Types        float32 or float64 for weights and biases, read as they are and converted exactly; all else float64.
// Points       x and steps to either side along the direction that the Jacobian at x stretches most: shares of the way
//              to the nearest kinks, and a ladder of lengths relative to max |x_i|. Nothing is proved of them, and
//              nothing need be: a secant is a lower bound whatever its points are.
// Quotients    ||f(a) - f(b)|| / ||a - b|| of stored points, rounded down: proved in real arithmetic (docs/bounds.md),
//              0 where nothing is. Sums may be made in any order and products be fused or not.
// Conventions  those of chain_secants on the CPU.
// Determinism  fixed order of every sum; a network's results do not depend on the others nor on the grid.
// Errors       of values none: NaN and infinities prove nothing, and give 0. Of launches: launch.cuh.
// clang-format on
#pragma once

#include "../params.h"
#include "chain_maps.h"

namespace lipfast::cuda {

constexpr int kMaxSecantLayers = 48;
constexpr int kMaxSecantActivations = 48;
constexpr int kMaxSecantSteps = 9;   // to either side of the sample
constexpr int kSecantPoints = 20;    // the sample and the steps fit: 1 + 2 * 9
constexpr int kMaxSecantSide = 64;   // of the smaller Gram matrix of a Jacobian
constexpr int kSecantRows = 8;       // of a Jacobian that a thread sums at a time
constexpr int kSecantThreads = 256;  // of a block, which has a network

// f(v) = min(max(v, low), high), or for LeakyReLU v > 0 ? v : slope v; NaN stays.
struct PiecewiseLinear {
  double low, high;  // the kinks; LeakyReLU: 0, inf
  double slope;
  bool leaky, limited;  // limited: |f| <= high, which bounds errors
};

// Chains of one shape; all in a kernel's arguments, so that a captured graph holds what it needs.
struct SecantChains {
  ChainMaps weights, biases;
  PiecewiseLinear activations[kMaxSecantActivations];
  int32_t widths[kMaxSecantLayers + 1];
  // Activations after layer l - 1, for l = 0 before the first: [starts[l], starts[l + 1]).
  uint8_t starts[kMaxSecantLayers + 2];
  int32_t networks, layers, widest;
  int32_t norm;  // 1, 2, or 0 for the largest entry
};

struct SecantLines {
  const double* x;  // (networks, inputs)
  double steps[kMaxSecantSteps];
  int32_t fractions, count;  // the first are shares of the way to the kinks, the others relative to max |x_i|
  double longest;            // of the way to a kink, relative to max |x_i|
  double* points;            // (networks, 1 + 2 count, inputs): the sample, then a step down and up for each
};

struct SecantQuotients {
  const double* points;  // as above
  int32_t count;
  double tight;   // loose: the best quotient is below this share of the best without errors
  double* found;  // (networks, 2): the best quotient, and 1 where it is loose, otherwise 0
  double* ends;   // (networks, 2, inputs): its points
};

// How a block's doubles of workspace are cut.
struct LinesLayout {
  int64_t widest, units = 0, rows, side;

  explicit LinesLayout(const SecantChains& chains) : widest(chains.widest) {
    for (int l = 0; l <= chains.layers; ++l) units += chains.widths[l];
    const int64_t outputs = chains.widths[chains.layers], inputs = chains.widths[0];
    rows = (outputs + kSecantRows - 1) / kSecantRows * kSecantRows;
    side = outputs < inputs ? outputs : inputs;
  }
  LIPFAST_HOST_DEVICE int64_t doubles() const { return 2 * widest + 2 * units + 2 * rows * widest + 2 * side * side; }
};
LIPFAST_HOST_DEVICE inline int64_t enclosure_doubles(int64_t widest) { return 4 * kSecantPoints * widest; }

// Blocks, and doubles of workspace for each.
struct SecantPlan {
  int64_t blocks, doubles;
};
SecantPlan plan_secant_lines_cuda(const SecantChains& chains, Dtype dtype);
SecantPlan plan_secant_quotients_cuda(const SecantChains& chains, Dtype dtype);

// Queue a kernel on `stream` (a cudaStream_t).
void launch_secant_lines_cuda(const SecantChains& chains, Dtype dtype, const SecantLines& lines, const SecantPlan& plan,
                              double* workspace, void* stream);
void launch_secant_quotients_cuda(const SecantChains& chains, Dtype dtype, const SecantQuotients& quotients,
                                  const SecantPlan& plan, double* workspace, void* stream);

}  // namespace lipfast::cuda

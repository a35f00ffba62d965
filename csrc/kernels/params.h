// Plain structures that the kernels of every device share: pointers, sizes, options. No torch here.
#pragma once

#include <cstdint>

namespace lipfast {

enum class Dtype : int32_t { kFloat32 = 0, kFloat64 = 1 };

// How the value of a spectral norm was found, and how its upper bound was proved.
enum class SpectralMethod : int32_t { kLanczos = 0, kPower = 1 };
enum class UpperMethod : int32_t {
  kNone = 0,      // no upper bound was asked for: +inf
  kCholesky = 1,  // t I - W W^T was factored: tight
  kHolder = 2,    // min(sqrt(||W||_1 ||W||_inf), ||W||_F): loose; no Gram matrix
};

// Threads for one large matrix: calls body(argument, item) for every item in [0, count), in any order.
struct Parallel {
  void (*run)(int64_t count, void (*body)(void* argument, int64_t item), void* argument);
};

// One matrix of the grouped op: row-major and dense, rows x cols.
struct SpectralProblem {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t cols;
  const double* start;  // start vector for the right singular vector (cols), or nullptr: seeded
  uint64_t seed;
  double rtol;
  int32_t max_passes;
  SpectralMethod method;
  bool certify;
  int64_t memory;            // bytes that the Gram matrix may take
  const Parallel* parallel;  // nullptr: this thread does everything
};

struct SpectralResult {
  double lower;
  double upper;
  int32_t passes;
  UpperMethod upper_method;
  bool finite;    // false: an entry is NaN or infinite, nothing else is set
  double* right;  // cols, unit norm, written by the kernel
  double* left;   // rows, unit norm
};

// B Jacobians of K x D, dense; spectral and Frobenius norms, one each per Jacobian.
struct JacobianReductionParams {
  const void* jacobian;
  Dtype dtype;
  int64_t batch;
  int64_t outputs;  // K
  int64_t inputs;   // D
  void* spectral;   // (batch), dtype of the Jacobian
  void* frobenius;  // (batch)
};

// `networks` chains of `layers` affine maps, all of the same shapes:
//   h_l = a_l(W_l h_{l-1} + b_l),  a_l(z) = z for z > 0, slope_l z otherwise.
struct ChainParams {
  const void* x;  // (batch, widths[0])
  Dtype dtype;
  int64_t batch;
  int64_t networks;
  int64_t layers;
  const int64_t* widths;       // layers + 1: input width, then the width after every layer
  const void* const* weights;  // networks * layers, row-major widths[l + 1] x widths[l]
  const void* const* biases;   // networks * layers, nullptr: no bias
  const double* slopes;        // layers
  void* spectral;              // (networks, batch)
  void* frobenius;             // (networks, batch)
};

}  // namespace lipfast

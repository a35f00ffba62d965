// Plain structures that the kernels of every device share: pointers, sizes, options. No torch here.
#pragma once

#include <cstdint>

// Contracts are read by C++ compilers and by nvcc.
#if defined(__CUDACC__)
#define LIPFAST_HOST_DEVICE __host__ __device__
#else
#define LIPFAST_HOST_DEVICE
#endif
// Small functions of every instruction set, and of every device: always inlined, so that no copy is left that the
// linker might merge with another instruction set's.
#define LIPFAST_INLINE inline __attribute__((always_inline))
#define LIPFAST_SHARED LIPFAST_HOST_DEVICE LIPFAST_INLINE

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

// Zero but for right and left when a kernel begins.
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

// A stage of a chain: an affine map, a pool, or a pointwise activation.
enum class StageKind : int32_t { kLinear = 0, kConvolution = 1, kMaxPool = 2, kAveragePool = 3, kActivation = 4 };
enum class Activation : int32_t {
  kReLU = 0,
  kLeakyReLU = 1,  // parameters: slope
  kReLU6 = 2,
  kHardtanh = 3,  // min, max
  kTanh = 4,
  kSigmoid = 5,
  kGELU = 6,      // with erf
  kGELUTanh = 7,  // its approximation
  kSiLU = 8,
  kSoftplus = 9,  // beta, threshold
  kELU = 10,      // alpha
};

struct ImageShape {
  int64_t channels, height, width;
};
LIPFAST_SHARED int64_t elements(const ImageShape& shape) { return shape.channels * shape.height * shape.width; }

struct ChainStage {
  StageKind kind;
  Activation activation;
  ImageShape in, out;  // kLinear: one pixel each
  int64_t pixels;      // kLinear: of the image that it flattens; its weight's columns are channel by channel
  int64_t affine;      // kLinear, kConvolution: index among the weights
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // along height and width
  int64_t groups;
  bool count_include_pad;
  double parameters[2];
};

// `networks` chains of the same stages and shapes.
struct ChainParams {
  const void* x;  // (batch, channels, height, width) of the first stage's input
  Dtype dtype;
  int64_t batch;
  int64_t networks;
  int64_t stages;
  const ChainStage* stage;
  ImageShape in, out;          // of the chain
  int64_t affine;              // linear and convolutional stages
  const void* const* weights;  // networks * affine, as torch has them
  const void* const* biases;   // networks * affine, nullptr: no bias
  void* spectral;              // (networks, batch)
  void* frobenius;             // (networks, batch)
};

}  // namespace lipfast

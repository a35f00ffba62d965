// Checks that every device's registration of an op makes, and small helpers for tensors of the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "../kernels/cpu/chain_secants.h"
#include "../kernels/params.h"

namespace lipfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? Dtype::kFloat32 : Dtype::kFloat64;
}

// float32 or float64, dense and row-major; `what` names the tensor in the error.
inline Dtype check_dense(const Tensor& tensor, int64_t dimensions, const std::string& what) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, what, ": expected ", dimensions, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), what, ": expected a contiguous tensor");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, what, ": expected float32 or float64");
  return dtype_of(tensor);
}

// A tensor's values as T, which the caller has checked.
template <class T>
const T* values(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}
template <class T>
T* mutable_values(Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Of what the tensors hold; nullptr for an empty one.
inline std::vector<const void*> addresses(const std::vector<Tensor>& tensors) {
  std::vector<const void*> found;
  for (const Tensor& tensor : tensors) found.push_back(tensor.numel() > 0 ? tensor.data_ptr() : nullptr);
  return found;
}

inline std::string text(const Tensor& tensor) {
  std::string sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes += (i > 0 ? " x " : "") + std::to_string(tensor.size(i));
  return sizes;
}

// The weights and biases of several networks with `affine` weights each: dense, of one type, of the first's shapes; an
// empty bias is none.
inline void check_networks(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t affine,
                           ScalarType type, const std::string& op) {
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &weight = weights[i], &bias = biases[i], &first = weights[i % static_cast<size_t>(affine)];
    const std::string name = op + ": weight " + std::to_string(i);
    check_dense(weight, first.dim(), name);
    STD_TORCH_CHECK(weight.scalar_type() == type, name, ": another dtype than the others");
    for (int64_t axis = 0; axis < first.dim(); ++axis) {
      STD_TORCH_CHECK(weight.size(axis) == first.size(axis), name, ": expected ", text(first), ", got ", text(weight));
    }
    if (bias.numel() == 0) continue;
    const std::string bias_name = op + ": bias " + std::to_string(i);
    check_dense(bias, 1, bias_name);
    STD_TORCH_CHECK(bias.scalar_type() == type, bias_name, ": another dtype than the others");
    STD_TORCH_CHECK(bias.size(0) == weight.size(0), bias_name, ": expected ", weight.size(0), " values");
  }
}

// Taps of a convolution per axis, three; differences of two are counted in 64 bits.
inline void check_tap_axes(const std::vector<int64_t>& axes, const std::string& op) {
  STD_TORCH_CHECK(axes.size() == 3, op, ": expected taps of three axes");
  for (const int64_t size : axes) {
    STD_TORCH_CHECK(size > 0 && size < int64_t{1} << 20, op, ": expected between 1 and 2^20 taps per axis");
  }
}

// An op's schema. It stands beside the op's checks, which _C_cuda compiles once more with LIPFAST_CHECKS_ONLY, without
// the schemas.
#if defined(LIPFAST_CHECKS_ONLY)
#define LIPFAST_SCHEMA(...)
#else
#define LIPFAST_SCHEMA(...) \
  STABLE_TORCH_LIBRARY_FRAGMENT(lipfast, m) { m.def(__VA_ARGS__); }
#endif

void check_spectral_norms(const std::vector<Tensor>& matrices, const std::vector<Tensor>& start);
void check_conv_norms(const std::vector<Tensor>& taps, const std::vector<Tensor>& start,
                      const std::vector<int64_t>& grid);
Dtype check_jacobian_reduction(const Tensor& jacobian);
void check_hermitian_residual(const Tensor& hermitian, const Tensor& matrices, const Tensor& factors);
void check_tap_products(const Tensor& taps, const std::vector<int64_t>& axes);
void check_symbol_grams(const Tensor& products, const std::vector<int64_t>& axes, const Tensor& symbols,
                        const Tensor& centres, const std::vector<int64_t>& periods, const Tensor& shifts);
void check_stack(const std::vector<Tensor>& tensors);
void check_shifted_grams(const Tensor& matrices, const Tensor& lower);
void check_cholesky_bounds(const Tensor& matrices, const Tensor& factors, const Tensor& failures, const Tensor& scales,
                           const Tensor& shifts);
// Returns the widths of all layers, the inputs' first.
std::vector<int64_t> check_chain_quadratic(const std::vector<Tensor>& weights, const std::vector<Tensor>& errors,
                                           const std::vector<Tensor>& means, const std::vector<Tensor>& products,
                                           const std::vector<Tensor>& start, int64_t layers, int64_t evaluations);
// (n, s, l), float32 or float64, of any strides.
Dtype check_wide(const Tensor& matrices, const std::string& op);
// The stages with the shapes between them, and the shapes of the first input and the last output.
struct ChainStages {
  std::vector<ChainStage> stages;
  ImageShape in, out;
  int64_t affine;
};
ChainStages check_chain_jacobian_norms(const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& biases, const std::vector<int64_t>& stages,
                                       const std::vector<double>& parameters);
// The number of networks.
int64_t check_chain_interval_jacobian(const std::vector<Tensor>& weights, const std::vector<Tensor>& errors,
                                      const std::vector<Tensor>& lower, const std::vector<Tensor>& upper, int64_t norm);
struct SecantStages {
  std::vector<SecantStage> stages;
  int64_t affine, inputs, outputs, widest;
};
// x: (networks, inputs) or, with three dimensions, (networks, points, inputs).
SecantStages check_chain_secants(const Tensor& x, int64_t dimensions, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<int64_t>& stages,
                                 const std::vector<double>& parameters);

}  // namespace lipfast

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

// float32 or float64, dense and row-major; `what` names the tensor in the error.
inline Dtype check_dense(const Tensor& tensor, int64_t dimensions, const std::string& what) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, what, ": expected ", dimensions, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), what, ": expected a contiguous tensor");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, what, ": expected float32 or float64");
  return type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kFloat64;
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

// The definitions stand beside the schemas; _C_cuda compiles them once more with LIPFAST_CHECKS_ONLY, without the
// schemas.
void check_spectral_norms(const std::vector<Tensor>& matrices, const std::vector<Tensor>& start);
void check_conv_norms(const std::vector<Tensor>& taps, const std::vector<Tensor>& start,
                      const std::vector<int64_t>& grid);
Dtype check_jacobian_reduction(const Tensor& jacobian);
void check_cholesky_residual(const Tensor& matrices, const Tensor& factors, const Tensor& shifts);
// The stages with the shapes between them, and the shapes of the first input and the last output.
struct ChainStages {
  std::vector<ChainStage> stages;
  ImageShape in, out;
  int64_t affine;
};
ChainStages check_chain_jacobian_norms(const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& biases, const std::vector<int64_t>& stages,
                                       const std::vector<double>& parameters);
struct SecantStages {
  std::vector<SecantStage> stages;
  int64_t affine, inputs, outputs, widest;
};
// x: (networks, inputs) or, with three dimensions, (networks, points, inputs).
SecantStages check_chain_secants(const Tensor& x, int64_t dimensions, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<int64_t>& stages,
                                 const std::vector<double>& parameters);

}  // namespace lipfast

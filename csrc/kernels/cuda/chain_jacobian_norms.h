// clang-format off
// chain_jacobian_norms on CUDA: per-sample norms of J(x) = D_L W_L ... D_1 W_1 for affine maps with pointwise
// activations after each, D_l: the diagonal of their derivatives.
//
// Types        float32 or float64 for x, weights, products and results; the reduction in float64.
// Error        that of a forward pass and of L products in the type, about n eps elementwise; activations and their
//              derivatives to a few eps. Where rounding carries a unit over a kink the Jacobian of the neighbouring
//              linear region is taken. Products in float32 whose units are all active are three of TF32 each, with
//              float32's accuracy; Jacobians that need more than TF32's range are found without.
// Conventions  autograd's, as on the CPU.
// Memory       a workspace per resident block; nothing of size B x K x n.
// Results      do not depend on the grid, on the size of a block or on the other samples and networks of a call.
// Errors       of values none: NaN gives NaN for that sample. Of launches: launch.cuh.
// clang-format on
#pragma once

#include "chain_maps.h"

namespace lipfast::cuda {

constexpr int kMaxChainWarps = 12;  // of a block: a sample each, kMaxChainRounds times
constexpr int kMinChainWarps = 4;
constexpr int kMaxChainRounds = 2;
constexpr int kMaxChainLayers = 64;
constexpr int kMaxChainActivations = 64;

struct ChainActivation {
  Activation function;
  double parameters[2];
};

// Chains of one shape; all in a kernel's arguments, so that a captured graph holds what it needs.
struct ChainLaunch {
  const void* x;  // (batch, widths[0])
  int64_t batch;
  int32_t networks, layers;
  ChainMaps weights, biases;
  ChainActivation activations[kMaxChainActivations];
  int32_t widths[kMaxChainLayers + 1];
  uint8_t starts[kMaxChainLayers + 1];  // those of layer l: activations[starts[l]] up to activations[starts[l + 1]]
  void* spectral;                       // (networks, batch)
  void* frobenius;
};

// Whether derivatives are 0 or 1, so that bits hold them; others are stored as values, too.
LIPFAST_HOST_DEVICE inline bool is_switch(Activation function) {
  return function == Activation::kReLU || function == Activation::kReLU6 || function == Activation::kHardtanh;
}
LIPFAST_HOST_DEVICE inline bool has_values(const ChainLaunch& chain, int layer) {
  for (int i = chain.starts[layer]; i < chain.starts[layer + 1]; ++i) {
    if (!is_switch(chain.activations[i].function)) return true;
  }
  return false;
}

// Whether no derivative of a hidden layer is 0, but for what lies below the type's range: all units are active.
inline bool is_dense(const ChainLaunch& chain) {
  for (int i = 0; i < chain.starts[chain.layers - 1]; ++i) {
    const ChainActivation& activation = chain.activations[i];
    const bool scaled = activation.function == Activation::kLeakyReLU || activation.function == Activation::kELU;
    if (is_switch(activation.function) || (scaled && activation.parameters[0] == 0)) return false;
  }
  return chain.layers > 1;
}

// Rows of a Jacobian that a warp sums in registers at a time.
inline int chain_rows(int64_t outputs) { return outputs <= 4 ? 4 : outputs == 9 || outputs == 10 ? 10 : 8; }

// How a block's part of the workspace is cut; `samples` are a tile's.
struct ChainLayout {
  int64_t warps, rounds, widest = 0, words = 0, values = 0, outputs, rows, element;
  bool dense;  // products by tensor cores

  ChainLayout(const ChainLaunch& chain, Dtype dtype, int64_t warps, int64_t rounds)
      : warps(warps),
        rounds(rounds),
        outputs(chain.widths[chain.layers]),
        element(dtype == Dtype::kFloat32 ? 4 : 8),
        dense(dtype == Dtype::kFloat32 && is_dense(chain)) {
    for (int l = 0; l <= chain.layers; ++l) widest = chain.widths[l] > widest ? chain.widths[l] : widest;
    for (int l = 0; l < chain.layers; ++l) words += (chain.widths[l + 1] + 31) / 32;
    for (int l = 0; l < chain.layers; ++l) values += has_values(chain, l) ? chain.widths[l + 1] : 0;
    const int64_t step = chain_rows(outputs);
    rows = (outputs + step - 1) / step * step;
    rows = (rows * element + 15) / 16 * 16 / element;
  }
  LIPFAST_HOST_DEVICE int64_t samples() const { return warps * rounds; }
  LIPFAST_HOST_DEVICE int64_t product_size() const { return widest * rows; }
  LIPFAST_HOST_DEVICE int64_t pitch() const { return (widest + 31) / 32 * 32; }
  LIPFAST_HOST_DEVICE int64_t dense_size() const { return samples() * outputs * pitch(); }
  // In bytes.
  LIPFAST_HOST_DEVICE int64_t activations() const { return aligned(samples() * widest * element); }
  LIPFAST_HOST_DEVICE int64_t product() const { return product_size() * element; }  // of a warp
  LIPFAST_HOST_DEVICE int64_t derivatives() const { return aligned(samples() * values * element); }
  LIPFAST_HOST_DEVICE int64_t products() const {
    const int64_t sparse = warps * (rounds + 1) * product(), all = dense ? 2 * dense_size() * element : 0;
    return sparse < all ? all : sparse;
  }
  LIPFAST_HOST_DEVICE int64_t bytes() const {
    return 2 * activations() + derivatives() + products() + aligned(samples() * words * 4);
  }
  LIPFAST_HOST_DEVICE static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
};

// How a call is cut: warps of a block, rounds, blocks; bytes and doubles of workspace for each block.
struct ChainPlan {
  int64_t warps, rounds, blocks, bytes, reduce;
};
ChainPlan plan_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype);

// Queues the kernel on `stream` (a cudaStream_t).
void launch_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype, const ChainPlan& plan,
                                      double* reduce_workspace, void* workspace, void* stream);

}  // namespace lipfast::cuda

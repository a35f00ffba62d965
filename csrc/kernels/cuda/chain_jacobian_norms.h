// clang-format off
// chain_jacobian_norms on CUDA: per-sample norms of J(x) = D_L W_L ... D_1 W_1 for affine maps and activations with one
// kink at 0, D_l = diag(1 where z_l > 0, slope_l elsewhere).
//
// Types        float32 or float64 for x, weights, products and results; the reduction in float64.
// Error        that of a forward pass and of L products in the type, about n eps elementwise; no tensor cores, whose
//              inputs of 10 bits would cost three digits. Where rounding flips the sign of z_l the Jacobian of the
//              neighbouring linear region is taken.
// Memory       a workspace per resident block; nothing of size B x K x n.
// Errors       of values none: NaN gives NaN for that sample. Of launches: launch.cuh.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast::cuda {

constexpr int kChainSamples = 8;  // of a block: a warp each
constexpr int kChainThreads = 32 * kChainSamples;
constexpr int kMaxChainLayers = 64;
constexpr int kMaxChainMaps = 128;  // networks times layers of one launch

// Chains of one shape; all in a kernel's arguments, so that a captured graph holds what it needs.
struct ChainLaunch {
  const void* x;  // (batch, widths[0])
  int64_t batch;
  int32_t networks, layers;
  const void* weights[kMaxChainMaps];  // network by network
  const void* biases[kMaxChainMaps];   // nullptr: none
  double slopes[kMaxChainLayers];
  int32_t widths[kMaxChainLayers + 1];
  void* spectral;  // (networks, batch)
  void* frobenius;
};

// Rows of a Jacobian that a warp sums in registers at a time.
inline int64_t chain_rows(int64_t outputs) { return outputs <= 4 ? 4 : 12; }

// How a block's part of the workspace is cut, in bytes.
struct ChainLayout {
  int64_t widest = 0, words = 0, rows = 0, element = 0;

  ChainLayout(const ChainLaunch& chain, Dtype dtype) : element(dtype == Dtype::kFloat32 ? 4 : 8) {
    for (int l = 0; l <= chain.layers; ++l) widest = chain.widths[l] > widest ? chain.widths[l] : widest;
    for (int l = 1; l <= chain.layers; ++l) words += (chain.widths[l] + 31) / 32;
    const int64_t outputs = chain.widths[chain.layers], step = chain_rows(outputs);
    rows = (outputs + step - 1) / step * step;
  }
  LIPFAST_HOST_DEVICE int64_t activations() const { return (kChainSamples * widest * element + 15) / 16 * 16; }
  LIPFAST_HOST_DEVICE int64_t products() const { return (kChainSamples * widest * rows * element + 15) / 16 * 16; }
  LIPFAST_HOST_DEVICE int64_t masks() const { return (kChainSamples * words * 4 + 15) / 16 * 16; }
  LIPFAST_HOST_DEVICE int64_t bytes() const { return 2 * activations() + 2 * products() + masks(); }
};

// How many blocks to give a workspace, and how much each: layout.bytes() bytes, and `reduce` doubles.
struct ChainPlan {
  int64_t blocks, bytes, reduce;
};
ChainPlan plan_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype);

// Queues the kernel on `stream` (a cudaStream_t).
void launch_chain_jacobian_norms_cuda(const ChainLaunch& chain, Dtype dtype, const ChainPlan& plan,
                                      double* reduce_workspace, void* workspace, void* stream);

}  // namespace lipfast::cuda

#include "../../kernels/cpu/chain_jacobian_norms.h"
#include "../../kernels/cpu/sample_order.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "threads.h"

namespace lipfast {
namespace {

// Networks [begin, begin + count): one thread each, or all threads for one after the other where there are few.
void pack(const ChainKernel& kernel, const ChainTiling& tiling, const ChainParams& params, int64_t begin, int64_t count,
          char* packed, int64_t packed_bytes) {
  const auto workspace = [&] { return Workspace(tiling.pack_workspace + 64); };
  const auto pack_one = [&](int64_t i, const Workspace& work, const Parallel* parallel) {
    kernel.pack(params, begin + i, packed + i * packed_bytes, work.as<double>(), parallel);
  };
  if (count >= torch::stable::get_num_threads()) {
    for_each_item(count, workspace, [&](int64_t i, const Workspace& work) { pack_one(i, work, nullptr); });
    return;
  }
  const StandardArithmetic arithmetic;
  const Workspace work = workspace();
  for (int64_t i = 0; i < count; ++i) pack_one(i, work, &kThreads);
}

// The order in which tiles take the samples.
std::vector<int64_t> order_of(const ChainParams& params, const ChainTiling& tiling) {
  std::vector<int64_t> order(static_cast<size_t>(params.batch));
  if (!tiling.shares) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  const int64_t length = elements(params.in);
  const int64_t block = std::max<int64_t>(kOrderBlock / tiling.tile, 1) * tiling.tile;
  for_each_item((params.batch + block - 1) / block, [] { return Workspace(0); },
                [&](int64_t item, const Workspace&) {
                  const int64_t begin = item * block, end = std::min(begin + block, params.batch);
                  order_samples(params.x, params.dtype, length, begin, end, tiling.tile, order.data());
                });
  return order;
}

std::tuple<Tensor, Tensor> chain_jacobian_norms_cpu(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                    std::vector<int64_t> stages, std::vector<double> parameters) {
  const ChainStages chain = check_chain_jacobian_norms(x, weights, biases, stages, parameters);
  const int64_t batch = x.size(0), networks = static_cast<int64_t>(weights.size()) / chain.affine;
  Tensor spectral = torch::stable::new_empty(x, {networks, batch});
  Tensor frobenius = torch::stable::new_empty(x, {networks, batch});
  const std::vector<const void*> weight_data = addresses(weights), bias_data = addresses(biases);
  const ChainParams params{x.data_ptr(),
                           dtype_of(x),
                           batch,
                           networks,
                           static_cast<int64_t>(chain.stages.size()),
                           chain.stages.data(),
                           chain.in,
                           chain.out,
                           chain.affine,
                           weight_data.data(),
                           bias_data.data(),
                           spectral.data_ptr(),
                           frobenius.data_ptr()};
  const ChainKernel kernel = chain_jacobian_norms_kernel(params.dtype);
  const ChainTiling tiling = kernel.tiling(params);
  const int64_t packed_bytes = tiling.packed * (params.dtype == Dtype::kFloat32 ? 4 : 8);
  // Networks are packed in groups, so that the packed copies stay small however many networks there are.
  const int64_t group = std::clamp<int64_t>((int64_t{16} << 20) / std::max<int64_t>(packed_bytes, 1), 1, networks);
  const Workspace packed(group * packed_bytes + 64);
  const int64_t tiles = (batch + tiling.tile - 1) / tiling.tile;
  const std::vector<int64_t> order = order_of(params, tiling);
  for (int64_t begin = 0; begin < networks && batch > 0; begin += group) {
    const int64_t count = std::min(group, networks - begin);
    pack(kernel, tiling, params, begin, count, packed.as<char>(), packed_bytes);
    for_each_item(
        count * tiles, [&] { return Workspace(tiling.workspace); },
        [&](int64_t item, const Workspace& workspace) {
          const int64_t network = item / tiles, first = item % tiles * tiling.tile;
          kernel.tile(params, begin + network, packed.as<char>() + network * packed_bytes, order.data() + first,
                      std::min(tiling.tile, batch - first), workspace.as<void>());
        });
  }
  return {spectral, frobenius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) { m.impl("chain_jacobian_norms", TORCH_BOX(&chain_jacobian_norms_cpu)); }

}  // namespace lipfast

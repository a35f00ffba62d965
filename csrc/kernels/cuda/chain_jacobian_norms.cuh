// Body of chain_jacobian_norms; the contract is in chain_jacobian_norms.h.
#pragma once

#include "chain_backward.cuh"
#include "chain_forward.cuh"
#include "warp_reduce.cuh"

namespace lipfast::cuda {

// Smaller sides of Jacobians up to which part of a warp of this kernel reduces, and a whole warp does; blocks reduce
// larger ones.
template <int kRows>
constexpr int kGroupSide = kRows == 8 ? 16 : kRows;
template <int kRows>
constexpr int kChainSide = kRows == 8 ? kWarpSide : kRows;

template <int kWidth>
__host__ __device__ constexpr int64_t group_bytes(int64_t warps) {
  return 8 * warps * Group<kWidth>::kCount * Group<kWidth>::kDoubles;
}
// Bytes of shared memory that the reduction of K x D Jacobians takes.
template <int kRows>
__host__ __device__ int64_t reduction_bytes(int64_t outputs, int64_t inputs, int64_t warps) {
  const ReduceLayout layout(outputs, inputs);
  if (layout.side > kChainSide<kRows>) return 8 * layout.shared();
  return layout.side > kGroupSide<kRows> ? group_bytes<kChainSide<kRows>>(warps)
                                         : group_bytes<kGroupSide<kRows>>(warps);
}

template <class T>
__device__ void store_chain_norms(const ChainBlock<T>& block, int s, double spectral, double frobenius) {
  const int64_t at = block.tile().network * block.chain.batch + block.tile().first + s;
  const bool bad = block.poison()[s] != 0;
  static_cast<T*>(block.chain.spectral)[at] = bad ? static_cast<T>(NAN) : static_cast<T>(spectral);
  static_cast<T*>(block.chain.frobenius)[at] = bad ? static_cast<T>(NAN) : static_cast<T>(frobenius);
}

template <class T>
__device__ JacobianView<T> jacobian_of_chain(const ChainBlock<T>& block, const T* product) {
  return {product, block.chain.widths[block.chain.layers], block.chain.widths[0], 1, block.layout.rows};
}

// The samples of this warp; as many at a time as there are groups of lanes.
template <class T, int kSide>
LIPFAST_PHASE void reduce_by_warps(const ChainBlock<T>& block) {
  using G = Group<kSide>;
  auto* shared = reinterpret_cast<double*>(block.shared() + block.memory.stages());
#pragma unroll 1
  for (int first = 0; first < block.layout.rounds; first += G::kCount) {
    const int round = first + G::index(), s = round * warps() + warp();
    const bool given = round < block.layout.rounds && s < block.count();
    double spectral, frobenius;
    reduce_in_warp<kSide, sizeof(T) == sizeof(double) ? 54 : 32>(
        jacobian_of_chain(block, block.product(block.step().done[given ? round : 0])), given,
        shared + (warp() * G::kCount + G::index()) * G::kDoubles, &spectral, &frobenius);
    if (given && G::row() == 0) store_chain_norms(block, s, spectral, frobenius);
  }
}

template <class T>
LIPFAST_PHASE void reduce_by_block(const ChainBlock<T>& block) {
  auto* shared = reinterpret_cast<double*>(block.shared() + block.memory.stages());
  for (int s = 0; s < block.count(); ++s) {
    const int64_t buffer = s % warps() * (block.layout.rounds + 1) + block.step().done[s / warps()];
    double spectral, frobenius;
    reduce_jacobian(jacobian_of_chain(block, block.tile().products + buffer * block.layout.product_size()), shared,
                    block.tile().reduction, &spectral, &frobenius);
    if (thread() == 0) store_chain_norms(block, s, spectral, frobenius);
  }
}

template <class T, int kRows>
__device__ void reduce_samples(const ChainBlock<T>& block) {
  const int64_t side = smaller(block.chain.widths[block.chain.layers], block.chain.widths[0]);
  if (side <= kGroupSide<kRows>) {
    reduce_by_warps<T, kGroupSide<kRows>>(block);
  } else if (side <= kChainSide<kRows>) {
    reduce_by_warps<T, kChainSide<kRows>>(block);
  } else {
    reduce_by_block(block);
  }
}

// Sets the block's next tile: blocks take every gridDim.x-th pair of a network and a tile of samples. Returns whether
// there is one.
template <class T>
LIPFAST_PHASE bool next_tile(const ChainBlock<T>& block) {
  const int64_t samples = block.layout.samples(), tiles = (block.chain.batch + samples - 1) / samples;
  const int turn = block.tile().turn + 1;
  __syncthreads();  // all have read it, and are done with the last tile
  const int64_t item = blockIdx.x + int64_t{turn} * gridDim.x;
  if (item >= block.chain.networks * tiles) return false;
  if (thread() == 0) {
    const ChainLayout& layout = block.layout;
    const int64_t first = item % tiles * samples;
    char* base = block.workspace + blockIdx.x * layout.bytes();
    char* derivatives = base + 2 * layout.activations();
    char* products = derivatives + layout.derivatives();
    const int64_t doubles = ReduceLayout(block.chain.widths[block.chain.layers], block.chain.widths[0]).global();
    block.tile() = {item / tiles,
                    first,
                    turn,
                    static_cast<int>(smaller(samples, block.chain.batch - first)),
                    reinterpret_cast<T*>(base),
                    reinterpret_cast<T*>(base + layout.activations()),
                    reinterpret_cast<T*>(derivatives),
                    reinterpret_cast<T*>(products),
                    reinterpret_cast<uint32_t*>(products + layout.warps * (layout.rounds + 1) * layout.product()),
                    block.reduce_workspace + blockIdx.x * doubles};
  }
  __syncthreads();
  return true;
}

template <class T, int kRows>
__global__ void __launch_bounds__(kWarp* kMaxChainWarps)
    chain_jacobian_norms_kernel(const __grid_constant__ ChainLaunch chain, const __grid_constant__ ChainLayout layout,
                                double* reduce_workspace, char* workspace) {
  const ChainBlock<T> block{chain, layout, {layout.warps, kRows, 0}, workspace, reduce_workspace};
  if (thread() == 0) block.tile().turn = -1;
  __syncthreads();
  while (next_tile(block)) {  // begins with a barrier
    forward(block);
    chain_products<T, kRows>(block);
    __syncthreads();  // the stages are free
    reduce_samples<T, kRows>(block);
  }
}

}  // namespace lipfast::cuda

// Body of chain_jacobian_norms; the contract is in chain_jacobian_norms.h.
#pragma once

#include "chain_backward.cuh"
#include "chain_dense.cuh"
#include "chain_forward.cuh"
#include "warp_reduce.cuh"

namespace lipfast::cuda {

// Smaller sides of Jacobians up to which part of a warp of this kernel reduces, and a whole warp does; blocks reduce
// larger ones. With two layouts of Jacobians, those of tensor cores and the warps' own, registers hold no more than 16.
template <int kRows>
constexpr int kGroupSide = kRows == 8 ? 16 : kRows;
template <int kRows, bool kDense>
constexpr int kChainSide = kRows == 8 && !kDense ? kWarpSide : kGroupSide<kRows>;

template <int kWidth>
__host__ __device__ constexpr int64_t group_bytes(int64_t warps) {
  return 8 * warps * Group<kWidth>::kCount * Group<kWidth>::kDoubles;
}
// Bytes of shared memory that the reduction of K x D Jacobians takes.
template <int kRows, bool kDense>
__host__ __device__ int64_t reduction_bytes(int64_t outputs, int64_t inputs, int64_t warps) {
  const ReduceLayout layout(outputs, inputs);
  if (layout.side > kChainSide<kRows, kDense>) return 8 * layout.shared();
  return layout.side > kGroupSide<kRows> ? group_bytes<kChainSide<kRows, kDense>>(warps)
                                         : group_bytes<kGroupSide<kRows>>(warps);
}

constexpr uint32_t kBad = 1, kStored = 2;  // in ChainBlock::poison()

template <class T>
__device__ void store_chain_norms(const ChainBlock<T>& block, int s, double spectral, double frobenius) {
  const ChainTile<T>& tile = block.tile();
  const int64_t at = tile.network * block.chain.batch + tile.first + s;
  const uint32_t flags = block.poison()[s];
  const bool bad = (flags & kBad) != 0;
  const bool lost = tile.jacobians != nullptr && !bad && !(frobenius >= tile.least);
  if (lost || (flags & kStored) != 0) return;
  block.poison()[s] = flags | kStored;
  static_cast<T*>(block.chain.spectral)[at] = bad ? static_cast<T>(NAN) : static_cast<T>(spectral);
  static_cast<T*>(block.chain.frobenius)[at] = bad ? static_cast<T>(NAN) : static_cast<T>(frobenius);
}

// Of a sample, whose warp has it in a buffer, or where tensor cores left it.
template <class T, bool kDense>
__device__ JacobianView<T> jacobian_of_chain(const ChainBlock<T>& block, int s, int buffer) {
  const int64_t outputs = block.layout.outputs, inputs = block.chain.widths[0], pitch = block.layout.pitch();
  const T* dense = kDense ? block.tile().jacobians : nullptr;
  if (dense != nullptr) return {dense + s * outputs * pitch, outputs, inputs, pitch, 1};
  const int64_t product = s % warps() * (block.layout.rounds + 1) + buffer;
  return {block.tile().products + product * block.layout.product_size(), outputs, inputs, 1, block.layout.rows};
}

// The samples of this warp; as many at a time as there are groups of lanes.
template <class T, int kSide, bool kDense>
LIPFAST_PHASE void reduce_by_warps(const ChainBlock<T>& block) {
  using G = Group<kSide>;
  // The largest Gram matrix leaves few of the registers that the kernel's many threads have.
  constexpr int kUnroll = kSide > 16 ? 1 : 4;
  auto* shared = reinterpret_cast<double*>(block.shared() + block.memory.stages());
#pragma unroll 1
  for (int first = 0; first < block.layout.rounds; first += G::kCount) {
    const int round = first + G::index(), s = round * warps() + warp();
    const bool given = round < block.layout.rounds && s < block.count();
    double spectral, frobenius;
    reduce_in_warp<kSide, sizeof(T) == sizeof(double) ? 54 : 32, kUnroll>(
        jacobian_of_chain<T, kDense>(block, given ? s : warp(), block.step().done[given ? round : 0]), given,
        shared + (warp() * G::kCount + G::index()) * G::kDoubles, &spectral, &frobenius);
    if (given && G::row() == 0) store_chain_norms(block, s, spectral, frobenius);
  }
}

template <class T, bool kDense>
LIPFAST_PHASE void reduce_by_block(const ChainBlock<T>& block) {
  auto* shared = reinterpret_cast<double*>(block.shared() + block.memory.stages());
  for (int s = 0; s < block.count(); ++s) {
    double spectral, frobenius;
    reduce_jacobian(jacobian_of_chain<T, kDense>(block, s, block.step().done[s / warps()]), shared,
                    block.tile().reduction, &spectral, &frobenius);
    if (thread() == 0) store_chain_norms(block, s, spectral, frobenius);
  }
}

template <class T, int kRows, bool kDense>
__device__ void reduce_samples(const ChainBlock<T>& block) {
  const int64_t side = smaller(block.chain.widths[block.chain.layers], block.chain.widths[0]);
  if (side <= kGroupSide<kRows>) {
    reduce_by_warps<T, kGroupSide<kRows>, kDense>(block);
  } else if (side <= kChainSide<kRows, kDense>) {
    reduce_by_warps<T, kChainSide<kRows, kDense>, kDense>(block);
  } else {
    reduce_by_block<T, kDense>(block);
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
                    reinterpret_cast<uint32_t*>(products + layout.products()),
                    block.reduce_workspace + blockIdx.x * doubles,
                    nullptr,
                    0};
  }
  __syncthreads();
  return true;
}

// Whether samples are left whose Jacobians need more range than tensor cores gave them. Begins with and ends after a
// barrier.
template <class T>
LIPFAST_PHASE bool samples_are_left(const ChainBlock<T>& block) {
  __syncthreads();  // the flags are written, and all are done with the Jacobians
  const bool left = thread() < block.count() && (block.poison()[thread()] & kStored) == 0;
  if (thread() == 0) block.tile().jacobians = nullptr;
  return __syncthreads_count(left) != 0;
}

template <class T, int kRows, bool kDense>
__global__ void __launch_bounds__(kWarp* kMaxChainWarps)
    chain_jacobian_norms_kernel(const __grid_constant__ ChainLaunch chain, const __grid_constant__ ChainLayout layout,
                                double* reduce_workspace, char* workspace) {
  const ChainBlock<T> block{chain, layout, {layout.warps, kRows, 0, kDense}, workspace, reduce_workspace};
  if (thread() == 0) block.tile().turn = -1;
  __syncthreads();
  while (next_tile(block)) {  // begins with a barrier
    forward(block);
    if constexpr (kDense) dense_products(block);
    do {
      if (!kDense || block.tile().jacobians == nullptr) chain_products<T, kRows>(block);
      __syncthreads();  // the stages are free
      reduce_samples<T, kRows, kDense>(block);
    } while (kDense && samples_are_left(block));
  }
}

}  // namespace lipfast::cuda

// What the parts of chain_jacobian_norms share: a block's tile of samples, and how its memory is cut.
#pragma once

#include "chain_activations.cuh"

namespace lipfast::cuda {

constexpr int kUnits = 32;      // of a layer that pass together: one word of bits
constexpr int kWarpUnits = 24;  // of a layer that a warp of the forward pass has
constexpr int kTileSamples = kMaxChainWarps * kMaxChainRounds;
constexpr int kInputs = 16;       // of a layer that the forward pass takes at a time
constexpr int kForwardParts = 4;  // in which it adds up the inputs of a layer that one warp could hold
static_assert(kMinChainWarps % kForwardParts == 0 && kMaxChainRounds <= 2);

// 16 bytes: what a lane moves at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};
// Columns of W in shared memory at a time.
template <class T>
constexpr int kPanel = 1024 / sizeof(T);
// Active ones among them that a lane sums at a time: kRows of each lie in registers.
template <class T, int kRows>
constexpr int kLaneColumns = (kRows == 4   ? 32
                              : kRows == 8 ? 24
                                           : 20) /
                             sizeof(T);
// Elements of a row of the forward pass in shared memory: 16 bytes more than it holds, against bank conflicts.
template <class T, int kWidth>
constexpr int kForwardStride = kWidth + Pack<T>::kSize;
constexpr int kDenseSide = 32;            // rows and columns of a product on tensor cores that a warp has
constexpr int kDenseStride = kUnits + 4;  // of rows in shared memory
template <class T>
__host__ __device__ constexpr int round_to_pack(int rows) {
  return (rows + Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize;
}

// Dynamic shared memory, in bytes: the tile; flags of the samples; per warp its step and lists of columns and
// units; two stages of W; per warp
// two stages of factors.
template <class T>
struct ChainShared {
  int64_t warps, rows, reduction;
  bool dense;

  static constexpr int64_t kTile = 128;
  static constexpr int64_t kFlags = 4 * kMaxChainWarps * kMaxChainRounds;
  static constexpr int64_t kStep = 64;
  static constexpr int64_t kLists = kStep + 4 * (kPanel<T> + kUnits);
  __host__ __device__ int64_t stage() const {
    const int64_t backward = kUnits * kPanel<T>;
    const int64_t wide = (kWarpUnits * warps + kTileSamples) * kForwardStride<T, kInputs>;
    const int64_t narrow = (kWarpUnits + kTileSamples) * kForwardStride<T, kInputs * kForwardParts>;
    const int64_t forward = larger(wide, narrow);
    // A stage of a product on tensor cores: rows, and columns with 8 more elements against bank conflicts; 32 x 32 for
    // each warp, four or two side by side.
    const int64_t tall = kDenseSide * (warps / 2) * kDenseStride + kUnits * (2 * kDenseSide + 8);
    const int64_t broad = kDenseSide * (warps / 4) * kDenseStride + kUnits * (4 * kDenseSide + 8);
    return larger(larger(backward, forward), dense ? larger(tall, broad) : 0) * static_cast<int64_t>(sizeof(T));
  }
  __host__ __device__ int64_t factors() const {
    return kUnits * round_to_pack<T>(static_cast<int>(rows)) * static_cast<int64_t>(sizeof(T));
  }
  __host__ __device__ int64_t lists() const { return kTile + kFlags; }
  __host__ __device__ int64_t stages() const { return lists() + warps * kLists; }
  __host__ __device__ int64_t all_factors() const { return stages() + 2 * stage(); }
  // reduction: bytes that it takes, from stages() on.
  __host__ __device__ int64_t bytes() const {
    return larger(all_factors() + warps * 2 * factors(), stages() + reduction);
  }
};

// Where a block is, and its buffers. It lies in shared memory, so that registers hold of it what is in use. Units whose
// derivative is not 0 are active; a sample's products hold a row of the Jacobian's columns for each active unit, one
// after another: [active unit][rows].
template <class T>
struct ChainTile {
  int64_t network, first;
  int turn, count;         // samples [first, first + count)
  T *activations, *spare;  // [sample][widest]
  T* derivatives;          // [layer with values][sample][unit]
  T* products;             // [warp][rounds + 1], or two of [sample][output][pitch] on tensor cores
  uint32_t* words;         // [layer][word][sample]: which units are active
  double* reduction;
  const T* jacobians;  // of tensor cores, or nullptr
  double least;        // Frobenius norm that those must have
};

// What a warp multiplies with: a layer, words and derivatives of its units and of its inputs (nullptr: all count, with
// derivative 1), from where to where. In shared memory for the same reason.
template <class T>
struct ChainStep {
  const T* weight;
  int units, inputs;
  const uint32_t *words, *words_below;
  const T* values_below;
  const T* product;
  T* next;
  int done[kMaxChainRounds];  // the buffers that hold the Jacobians of each round
};

template <class T>
struct ChainBlock {
  const ChainLaunch& chain;
  const ChainLayout& layout;
  ChainShared<T> memory;
  char* workspace;           // layout.bytes() per block
  double* reduce_workspace;  // ReduceLayout::global() doubles per block

  // Not a member: the compiler must see that it points to shared memory, in every phase.
  __device__ static char* shared() {
    LIPFAST_DYNAMIC_SHARED(memory_of_block);
    return memory_of_block;
  }

  __device__ ChainTile<T>& tile() const { return *reinterpret_cast<ChainTile<T>*>(shared()); }
  __device__ int count() const { return tile().count; }
  __device__ int samples() const { return static_cast<int>(layout.samples()); }
  __device__ int rows() const { return static_cast<int>(layout.rows); }
  // Called, so that hot loops hold the address and do not look it up again.
  LIPFAST_PHASE const T* weight(int l) const {
    return static_cast<const T*>(chain.weights.of(tile().network, chain.layers, l));
  }
  LIPFAST_PHASE const T* bias(int l) const {
    return static_cast<const T*>(chain.biases.of(tile().network, chain.layers, l));
  }
  __device__ int units(int l) const { return chain.widths[l + 1]; }
  __device__ int inputs(int l) const { return chain.widths[l]; }
  __device__ uint32_t* poison() const { return reinterpret_cast<uint32_t*>(shared() + memory.kTile); }
  __device__ int32_t* columns() const { return reinterpret_cast<int32_t*>(own() + memory.kStep); }
  __device__ int32_t* listed_units() const { return columns() + kPanel<T>; }
  __device__ ChainStep<T>& step() const { return *reinterpret_cast<ChainStep<T>*>(own()); }
  __device__ char* own() const { return shared() + memory.lists() + warp() * memory.kLists; }
  __device__ T* stage(int which) const {
    return reinterpret_cast<T*>(shared() + memory.stages() + which * memory.stage());
  }
  __device__ T* factors(int which) const {
    return reinterpret_cast<T*>(shared() + memory.all_factors() + (2 * warp() + which) * memory.factors());
  }
  __device__ T* product(int which) const {
    return tile().products + (warp() * (layout.rounds + 1) + which) * layout.product_size();
  }
  // Of the units of layer l, or of the inputs for l = -1.
  __device__ uint32_t* words_of(int l) const {
    int64_t before = 0;
    for (int i = 0; i < l; ++i) before += (units(i) + kUnits - 1) / kUnits;
    return tile().words + before * layout.samples();
  }
  // nullptr: the layer's derivatives are 0 or 1.
  __device__ T* derivatives_of(int l, int sample) const {
    if (l < 0 || !has_values(chain, l)) return nullptr;
    int64_t before = 0;
    for (int i = 0; i < l; ++i) before += has_values(chain, i) ? units(i) : 0;
    return tile().derivatives + before * layout.samples() + int64_t{sample} * units(l);
  }
};

// Lanes below this one.
__device__ inline uint32_t lanes_below() { return (1u << lane()) - 1; }

// The bits of 32 of `all` units: those of a layer's word, or all that there are.
__device__ inline uint32_t active(const uint32_t* words, int samples, int sample, int word, int all) {
  if (words != nullptr) return words[int64_t{word} * samples + sample];
  const int here = all - word * kUnits;
  return here >= kUnits ? kAllLanes : (1u << here) - 1;
}

}  // namespace lipfast::cuda

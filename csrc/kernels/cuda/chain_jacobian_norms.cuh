// Body of chain_jacobian_norms; the contract is in chain_jacobian_norms.h.
#pragma once

#include "chain_jacobian_norms.h"
#include "reduce.cuh"

namespace lipfast::cuda {

constexpr int64_t kUnits = 32;  // of a layer that pass together: one mask word

// 16 bytes: what a lane moves at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};
template <class T>
constexpr int64_t kPanelColumns = kWarp * Pack<T>::kSize;  // columns of W in shared memory: a Pack per lane

// One block's buffers. Products are stored unit by unit, with the rows of the Jacobian together: [sample][unit][rows].
template <class T>
struct ChainBlock {
  const ChainLaunch& chain;
  const ChainLayout& layout;
  int64_t network, first, count;  // samples [first, first + count)
  T *activations, *spare, *product, *next;
  uint32_t* masks;   // [word][sample], layer by layer: which units have z > 0
  uint32_t* poison;  // kChainSamples, shared: whether a sample met a NaN
  char* stage;       // shared: two panels of W

  __device__ const T* weight(int l) const { return static_cast<const T*>(chain.weights[network * chain.layers + l]); }
  __device__ const T* bias(int l) const { return static_cast<const T*>(chain.biases[network * chain.layers + l]); }
  __device__ T* sample_product(T* of) const { return of + warp() * layout.widest * layout.rows; }
};

template <class T>
__device__ T warp_total(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// z = W h + b for all samples of the tile, a unit per warp: W is read once for all of them.
template <class T>
__device__ void affine(const ChainBlock<T>& block, int l, const T* h, int64_t h_stride, T* z) {
  const T *w = block.weight(l), *b = block.bias(l);
  const int64_t inputs = block.chain.widths[l], outputs = block.chain.widths[l + 1];
  for (int64_t o = warp(); o < outputs; o += warps()) {
    T sums[kChainSamples] = {};
    for (int64_t j = lane(); j < inputs; j += kWarp) {
      const T entry = w[o * inputs + j];
#pragma unroll
      for (int s = 0; s < kChainSamples; ++s) {
        if (s < block.count) sums[s] += entry * h[s * h_stride + j];
      }
    }
#pragma unroll
    for (int s = 0; s < kChainSamples; ++s) {
      sums[s] = warp_total(sums[s]);
      if (lane() == s && s < block.count) z[s * block.layout.widest + o] = sums[s] + (b != nullptr ? b[o] : T(0));
    }
  }
}

// h = a(z) in place, and the signs of z as bits, a sample per warp.
template <class T>
__device__ void activate(const ChainBlock<T>& block, int64_t units, T slope, T* z, uint32_t* words) {
  const int64_t s = warp();
  bool bad = false;
  for (int64_t first = 0; first < units; first += kUnits) {
    const int64_t i = first + lane();
    const bool inside = s < block.count && i < units;
    const T value = inside ? z[s * block.layout.widest + i] : T(0);
    bad = bad || !(value == value);
    const uint32_t signs = __ballot_sync(kAllLanes, value > 0);
    if (inside) z[s * block.layout.widest + i] = value > 0 ? value : value * slope;
    if (lane() == 0) words[first / kUnits * kChainSamples + s] = signs;
  }
  const uint32_t any = __ballot_sync(kAllLanes, bad);
  if (lane() == 0 && any != 0) block.poison[s] = 1;
}

// The forward pass. Ends with a barrier.
template <class T>
__device__ void forward(const ChainBlock<T>& block) {
  const T* h = static_cast<const T*>(block.chain.x) + block.first * block.chain.widths[0];
  int64_t h_stride = block.chain.widths[0];
  T *z = block.activations, *spare = block.spare;
  uint32_t* words = block.masks;
  if (thread() < kChainSamples) block.poison[thread()] = 0;
  for (int l = 0; l < block.chain.layers; ++l) {
    const int64_t units = block.chain.widths[l + 1];
    affine(block, l, h, h_stride, z);
    __syncthreads();
    activate(block, units, static_cast<T>(block.chain.slopes[l]), z, words);
    __syncthreads();
    words += round_up(units, kUnits) / kUnits * kChainSamples;
    h = z;
    h_stride = block.layout.widest;
    T* swap = z;
    z = spare;
    spare = swap;
  }
}

// product = D_L W_L of this warp's sample. words: signs of the last layer.
template <class T>
__device__ void last_layer(const ChainBlock<T>& block, const uint32_t* words) {
  const int l = block.chain.layers - 1;
  const int64_t outputs = block.chain.widths[l + 1], units = block.chain.widths[l], rows = block.layout.rows;
  const T slope = static_cast<T>(block.chain.slopes[l]);
  const T* w = block.weight(l);
  T* g = block.sample_product(block.product);
  for (int64_t at = lane(); at < units * rows && warp() < block.count; at += kWarp) {
    const int64_t k = at / units, i = at % units;
    T value = 0;
    if (k < outputs) {
      const bool positive = (words[k / kUnits * kChainSamples + warp()] >> (k % kUnits) & 1) != 0;
      value = w[k * units + i] * (positive ? T(1) : slope);
    }
    g[i * rows + k] = value;
  }
}

// The first group of units at or after `group` in which some sample of the tile has a unit that counts.
__device__ inline int64_t next_group(const uint32_t* words, int64_t groups, bool skip, int64_t group) {
  for (; group < groups && skip; ++group) {
    uint32_t any = 0;
    for (int s = 0; s < kChainSamples; ++s) any |= words[group * kChainSamples + s];
    if (any != 0) break;
  }
  return group;
}

// Queues copies of W[group of units][panel of columns]; zeros beyond its columns. Rows that are not aligned to 16 bytes
// go element by element.
template <class T>
__device__ void stage_panel(const T* w, int64_t units, int64_t columns, int64_t group, int64_t first_column, T* to) {
  constexpr int kSize = Pack<T>::kSize;
  const bool aligned = columns % kSize == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
  for (int64_t at = thread(); at < kUnits * kWarp; at += threads()) {
    const int64_t unit = group * kUnits + at / kWarp, column = first_column + at % kWarp * kSize;
    T* pack = to + at * kSize;
    if (unit >= units) continue;  // no mask has a bit there
    const T* from = w + unit * columns + column;
    if (aligned && column < columns) {
      copy_async<16>(pack, from);
      continue;
    }
    for (int c = 0; c < kSize; ++c) {
      if (column + c < columns) {
        copy_async<sizeof(T)>(pack + c, from + c);
      } else {
        pack[c] = 0;
      }
    }
  }
}

// sums[r][c] += sum over the units of a group: derivative * g[unit][row + r] * w[unit][lane's column c].
template <class T, int kRows>
__device__ void add_group(const T* g, int64_t rows, const T* panel, uint32_t signs, uint32_t units, T slope,
                          T (&sums)[kRows][Pack<T>::kSize]) {
  constexpr int kSize = Pack<T>::kSize;
  for (uint32_t left = slope == 0 ? signs : units; left != 0; left &= left - 1) {
    const int unit = __ffs(static_cast<int>(left)) - 1;
    const T derivative = (signs >> unit & 1) != 0 ? T(1) : slope;
    const Pack<T> w = reinterpret_cast<const Pack<T>*>(panel)[unit * kWarp + lane()];
#pragma unroll
    for (int r = 0; r < kRows; r += kSize) {
      const Pack<T> factors = *reinterpret_cast<const Pack<T>*>(g + unit * rows + r);
#pragma unroll
      for (int q = 0; q < kSize; ++q) {
        const T factor = factors.at[q] * derivative;
#pragma unroll
        for (int c = 0; c < kSize; ++c) sums[r + q][c] += factor * w.at[c];
      }
    }
  }
}

// next[column][row ..] = sum over units: product[unit][row ..] derivative W_l[unit][column], for kRows rows and a panel
// of columns; W comes through shared memory, the next group while this one is used. words: signs of layer l.
template <class T, int kRows>
__device__ void multiply_panel(const ChainBlock<T>& block, int l, const uint32_t* words, int64_t row,
                               int64_t first_column) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t units = block.chain.widths[l + 1], columns = block.chain.widths[l], rows = block.layout.rows;
  const int64_t groups = round_up(units, kUnits) / kUnits;
  const T slope = static_cast<T>(block.chain.slopes[l]);
  const T *w = block.weight(l), *g = block.sample_product(block.product) + row;
  T *panel = reinterpret_cast<T*>(block.stage), *other = panel + kUnits * kPanelColumns<T>;
  T sums[kRows][kSize] = {};
  int64_t group = next_group(words, groups, slope == 0, 0);
  if (group < groups) stage_panel(w, units, columns, group, first_column, panel);
  copy_async_commit();
  while (group < groups) {
    const int64_t following = next_group(words, groups, slope == 0, group + 1);
    if (following < groups) stage_panel(w, units, columns, following, first_column, other);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const int64_t here = smaller(kUnits, units - group * kUnits);
    const uint32_t all = here == kUnits ? kAllLanes : (1u << here) - 1;
    if (warp() < block.count) {
      add_group<T, kRows>(g + group * kUnits * rows, rows, panel, words[group * kChainSamples + warp()], all, slope,
                          sums);
    }
    __syncthreads();  // before the panel is overwritten
    T* swap = panel;
    panel = other;
    other = swap;
    group = following;
  }
  copy_async_wait<0>();
  T* out = block.sample_product(block.next) + row;
#pragma unroll
  for (int c = 0; c < kSize; ++c) {
    const int64_t column = first_column + lane() * kSize + c;
    if (column >= columns || warp() >= block.count) continue;
#pragma unroll
    for (int r = 0; r < kRows; r += kSize) {
      Pack<T> pack;
#pragma unroll
      for (int q = 0; q < kSize; ++q) pack.at[q] = sums[r + q][c];
      *reinterpret_cast<Pack<T>*>(out + column * rows + r) = pack;
    }
  }
}

// The Jacobians of the tile's samples, in block.product. Between layers no barrier is needed: a sample's products are
// its warp's own, and multiply_panel reads them after its first barrier and never after its last. Ends with one.
template <class T, int kRows>
__device__ void chain_products(ChainBlock<T>& block) {
  const uint32_t* words = block.masks + block.layout.words * kChainSamples;
  int l = block.chain.layers - 1;
  words -= round_up(block.chain.widths[l + 1], kUnits) / kUnits * kChainSamples;
  last_layer(block, words);
  for (--l; l >= 0; --l) {
    words -= round_up(block.chain.widths[l + 1], kUnits) / kUnits * kChainSamples;
    for (int64_t column = 0; column < block.chain.widths[l]; column += kPanelColumns<T>) {
      for (int64_t row = 0; row < block.layout.rows; row += kRows) {
        multiply_panel<T, kRows>(block, l, words, row, column);
      }
    }
    T* swap = block.product;
    block.product = block.next;
    block.next = swap;
  }
  __syncthreads();
}

template <class T>
__device__ void reduce_samples(const ChainBlock<T>& block, double* shared, double* reduce_workspace) {
  const int64_t outputs = block.chain.widths[block.chain.layers], inputs = block.chain.widths[0];
  const int64_t rows = block.layout.rows;
  for (int64_t s = 0; s < block.count; ++s) {
    const JacobianView<T> view{block.product + s * block.layout.widest * rows, outputs, inputs, 1, rows};
    double spectral, frobenius;
    reduce_jacobian(view, shared, reduce_workspace, &spectral, &frobenius);
    if (thread() == 0) {
      const int64_t at = block.network * block.chain.batch + block.first + s;
      const bool bad = block.poison[s] != 0;
      static_cast<T*>(block.chain.spectral)[at] = bad ? static_cast<T>(NAN) : static_cast<T>(spectral);
      static_cast<T*>(block.chain.frobenius)[at] = bad ? static_cast<T>(NAN) : static_cast<T>(frobenius);
    }
  }
  __syncthreads();
}

// Bytes of dynamic shared memory: poison, then two panels of W or the reduction.
template <class T>
__host__ __device__ int64_t chain_shared(int64_t outputs, int64_t inputs) {
  const int64_t panels = 2 * kUnits * kPanelColumns<T> * static_cast<int64_t>(sizeof(T));
  return 4 * kChainSamples + larger(panels, 8 * ReduceLayout(outputs, inputs).shared());
}

// Blocks of kChainThreads threads take every gridDim.x-th pair of a network and a tile of samples. workspace:
// layout.bytes() per block; reduce_workspace: ReduceLayout::global() doubles per block.
template <class T, int kRows>
__global__ void __launch_bounds__(kChainThreads, 2)
    chain_jacobian_norms_kernel(const __grid_constant__ ChainLaunch chain, const __grid_constant__ ChainLayout layout,
                                double* reduce_workspace, char* workspace) {
  LIPFAST_DYNAMIC_SHARED(shared);
  char* base = workspace + blockIdx.x * layout.bytes();
  const ReduceLayout reduction(chain.widths[chain.layers], chain.widths[0]);
  const int64_t tiles = (chain.batch + kChainSamples - 1) / kChainSamples;
  for (int64_t item = blockIdx.x; item < chain.networks * tiles; item += gridDim.x) {
    const int64_t first = item % tiles * kChainSamples;
    char* products = base + 2 * layout.activations();
    ChainBlock<T> block{chain,
                        layout,
                        item / tiles,
                        first,
                        smaller<int64_t>(kChainSamples, chain.batch - first),
                        reinterpret_cast<T*>(base),
                        reinterpret_cast<T*>(base + layout.activations()),
                        reinterpret_cast<T*>(products),
                        reinterpret_cast<T*>(products + layout.products()),
                        reinterpret_cast<uint32_t*>(products + 2 * layout.products()),
                        reinterpret_cast<uint32_t*>(shared),
                        shared + 4 * kChainSamples};
    forward(block);
    chain_products<T, kRows>(block);
    reduce_samples(block, reinterpret_cast<double*>(block.stage), reduce_workspace + blockIdx.x * reduction.global());
  }
}

}  // namespace lipfast::cuda

// The forward pass of chain_jacobian_norms for a tile of samples: tiled products, and which units are active.
#pragma once

#include "chain_block.cuh"

namespace lipfast::cuda {

// Queues copies of [row][first, first + kWidth) of a matrix with `columns` columns; zeros beyond them. Rows that are
// not aligned to 16 bytes go element by element.
template <class T, int kWidth>
__device__ void stage_rows(const T* from, int rows, int columns, int64_t row_step, int first, T* to) {
  constexpr int kSize = Pack<T>::kSize, kPacks = kWidth / kSize;
  const bool aligned = row_step % kSize == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  for (int at = static_cast<int>(thread()); at < rows * kPacks; at += static_cast<int>(threads())) {
    const int row = at / kPacks, column = first + at % kPacks * kSize;
    T* pack = to + row * kForwardStride<T, kWidth> + at % kPacks * kSize;
    const T* source = from + row * row_step + column;
    if (aligned && column + kSize <= columns) {
      copy_async<16>(pack, source);
      continue;
    }
    for (int c = 0; c < kSize; ++c) {
      if (column + c < columns) {
        copy_async<sizeof(T)>(pack + c, source + c);
      } else {
        pack[c] = 0;
      }
    }
  }
}

// sums[i][t] += sum over kInputs of h[sample 4 i + ..] w[unit 8 t + ..], in rows of kStride elements: a lane has kPer
// samples and three units.
template <class T, int kPer, int kStride>
__device__ void add_inputs(const T* h, const T* w, T (&sums)[kPer][3]) {
  constexpr int kSize = Pack<T>::kSize;
#pragma unroll
  for (int j = 0; j < kInputs; j += kSize) {
    Pack<T> entries[3];
#pragma unroll
    for (int t = 0; t < 3; ++t) entries[t] = *reinterpret_cast<const Pack<T>*>(w + 8 * t * kStride + j);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const Pack<T> values = *reinterpret_cast<const Pack<T>*>(h + 4 * i * kStride + j);
#pragma unroll
      for (int c = 0; c < kSize; ++c) {
#pragma unroll
        for (int t = 0; t < 3; ++t) sums[i][t] += values.at[c] * entries[t].at[c];
      }
    }
  }
}

// How the warps of a block share z = W h + b: `down` of them side by side along the units, each with 24 of them, and
// each such set with samples of its own. Where kParts is not 1, kParts neighbours have the same units and samples, and
// a part of the inputs each.
struct ForwardCut {
  int down, unit, sample, part;
};
template <int kPer, int kParts>
__device__ ForwardCut forward_cut(int units) {
  const int down = kParts > 1 ? 1 : smaller(warps(), (units + kWarpUnits - 1) / kWarpUnits);
  const int set = warp() / kParts;
  return {down, kWarpUnits * (set % down), 4 * kPer * (set / down), warp() % kParts};
}

// Writes the sums of a lane, with bias. out: its first unit.
template <class T, int kPer>
__device__ void store_units(const ChainBlock<T>& block, const T* bias, const T (&sums)[kPer][3], int out, int units,
                            int sample, T* z) {
#pragma unroll
  for (int t = 0; t < 3; ++t) {
    const int o = out + 8 * t;
    if (o >= units) continue;
    const T shift = bias != nullptr ? bias[o] : T(0);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (sample + 4 * i < block.count()) z[(sample + 4 * i) * block.layout.widest + o] = sums[i][t] + shift;
    }
  }
}

// Adds the kParts partial sums of neighbouring warps, in their order, in those of part 0. scratch: shared memory that
// no other warp uses. Begins without a barrier of the block.
template <class T, int kPer, int kParts>
__device__ void add_parts(int part, T* scratch, T (&sums)[kPer][3]) {
  T* own = scratch + thread();
#pragma unroll
  for (int i = 0; i < kPer * 3; ++i) own[i * threads()] = sums[i / 3][i % 3];
  __syncthreads();
  if (part != 0) return;
#pragma unroll
  for (int i = 0; i < kPer * 3; ++i) {
#pragma unroll
    for (int p = 1; p < kParts; ++p) sums[i / 3][i % 3] += own[i * threads() + p * kWarp];
  }
}

// z = W h + b for all samples of the tile. A warp has 24 units of a panel and 4 kPer samples, so that W is read once
// for all of them; the next inputs are copied while these are used. Layers that are narrower than a panel leave warps
// for other samples, or for other inputs.
template <class T, int kPer, int kParts>
__device__ void affine(const ChainBlock<T>& block, int l, const T* h, int64_t h_step, T* z) {
  constexpr int kWidth = kInputs * kParts, kStride = kForwardStride<T, kWidth>;
  const T *w = block.weight(l), *b = block.bias(l);
  const int inputs = block.inputs(l), units = block.units(l), chunks = (inputs + kWidth - 1) / kWidth;
  const ForwardCut cut = forward_cut<kPer, kParts>(units);
  const int panel = kWarpUnits * cut.down, sample = cut.sample + lane() / 8, unit = cut.unit + lane() % 8;
  // Read once: copies may write to any memory, as far as the compiler knows.
  const int count = block.count();
  const bool busy = cut.sample < count;
  T *const even = block.stage(0), *const odd = block.stage(1);
#pragma unroll 1
  for (int first = 0; first < units; first += panel) {
    const int here = smaller(panel, units - first);
    const auto queue = [&](int chunk) {
      T* to = chunk % 2 == 0 ? even : odd;
      stage_rows<T, kWidth>(w + int64_t{first} * inputs, here, inputs, inputs, chunk * kWidth, to);
      stage_rows<T, kWidth>(h, count, inputs, h_step, chunk * kWidth, to + panel * kStride);
    };
    T sums[kPer][3] = {};
    queue(0);
    copy_async_commit();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) queue(chunk + 1);
      copy_async_commit();
      copy_async_wait<1>();
      __syncthreads();
      if (busy) {
        const T* staged = (chunk % 2 == 0 ? even : odd) + cut.part * kInputs;
        add_inputs<T, kPer, kStride>(staged + (panel + sample) * kStride, staged + unit * kStride, sums);
      }
      __syncthreads();  // before the stage is overwritten
    }
    copy_async_wait<0>();
    if constexpr (kParts > 1) add_parts<T, kPer, kParts>(cut.part, block.stage(0), sums);
    if (cut.part == 0) store_units(block, b, sums, first + unit, units, sample, z);
  }
}

// h = a(z) in place, a'(z) where it is neither 0 nor 1, and bits of the active units; samples go to warps.
template <class T>
LIPFAST_PHASE void activate(const ChainBlock<T>& block, int l, T* z) {
  const int units = block.units(l), samples = block.samples();
  const int first = block.chain.starts[l], last = block.chain.starts[l + 1];
  uint32_t* words = block.words_of(l);
  for (int s = warp(); s < block.count(); s += warps()) {
    T* values = block.derivatives_of(l, s);
    bool bad = false;
    for (int word = 0; word * kUnits < units; ++word) {
      const int i = word * kUnits + lane();
      const bool inside = i < units;
      T h = inside ? z[s * block.layout.widest + i] : T(0), derivative = inside ? T(1) : T(0);
      bad = bad || !(h == h);
      for (int a = first; a < last; ++a) {
        T factor;
        h = evaluate(block.chain.activations[a], h, factor);
        derivative *= factor;
      }
      const uint32_t bits = __ballot_sync(kAllLanes, derivative != 0);
      if (inside) {
        z[s * block.layout.widest + i] = h;
        if (values != nullptr) values[i] = derivative;
      }
      if (lane() == 0) words[int64_t{word} * samples + s] = bits;
    }
    const uint32_t any = __ballot_sync(kAllLanes, bad);
    if (lane() == 0 && any != 0) block.poison()[s] = 1;
  }
}

// A layer for all samples of the tile; activations go from one buffer to the other. Ends with a barrier.
template <class T>
__device__ void forward_layer(const ChainBlock<T>& block, int l) {
  const ChainTile<T>& tile = block.tile();
  T* z = l % 2 == 0 ? tile.activations : tile.spare;
  const T* h = l % 2 == 0 ? tile.spare : tile.activations;
  int64_t h_step = block.layout.widest;
  if (l == 0) {
    h_step = block.inputs(0);
    h = static_cast<const T*>(block.chain.x) + tile.first * h_step;
  }
  // What is added in which order depends on the number of units alone.
  const int sets = (block.units(l) + kWarpUnits - 1) / kWarpUnits, samples = block.samples();
  if (sets == 1) {
    samples > 4 * (warps() / kForwardParts) ? affine<T, 2, kForwardParts>(block, l, h, h_step, z)
                                            : affine<T, 1, kForwardParts>(block, l, h, h_step, z);
  } else if (samples <= 8 * (warps() / sets)) {
    affine<T, 2, 1>(block, l, h, h_step, z);
  } else if (samples <= 12 * (warps() / sets) || samples <= 12) {
    affine<T, 3, 1>(block, l, h, h_step, z);
  } else {
    affine<T, 6, 1>(block, l, h, h_step, z);
  }
  __syncthreads();
  activate(block, l, l % 2 == 0 ? tile.activations : tile.spare);
  __syncthreads();
}

template <class T>
LIPFAST_PHASE void forward(const ChainBlock<T>& block) {
  if (thread() < block.samples()) block.poison()[thread()] = 0;
#pragma unroll 1
  for (int l = 0; l < block.chain.layers; ++l) forward_layer(block, l);
}

}  // namespace lipfast::cuda

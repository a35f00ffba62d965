// The products of chain_jacobian_norms in float32 where all units are active, by tensor cores: the rows of all samples
// of a tile are those of one matrix, [sample][output], and every layer is a product of it with W.
//
// Range. What a tensor core drops lies below 2^-126: a product of parts, or a part. A term of a sum loses at most
// 2^-126 (4 + 2 |a| + 2 |w|) that way. With g = prod max(1, s sqrt(units inputs) max |W|), s the steepest derivative of
// a layer's activations, no row of a product is longer than g, nor what is lost enlarged by more on its way down. So
// the Jacobian's loss is at most 2^-123 L n sqrt(K n) g in the Frobenius norm, n the widest layer; a Jacobian whose own
// norm F has F / sqrt(K) >= 2^26 times that keeps 2^-26 of its norms. Others are found again by chain_products.
#pragma once

#include "chain_block.cuh"
#include "tensor_core.cuh"

namespace lipfast::cuda {

// A bound on |a'|.
__device__ inline double steepest(const ChainActivation& activation) {
  const bool scaled = activation.function == Activation::kLeakyReLU || activation.function == Activation::kELU;
  return scaled ? larger(1.0, fabs(activation.parameters[0])) : 1.25;
}

// The factor of layer l in g. Its largest entry does not depend on how a block takes them. Begins and ends with a
// barrier.
__device__ inline double growth(const ChainBlock<float>& block, int l, double* scratch) {
  constexpr int kSize = Pack<float>::kSize;
  const float* w = block.weight(l);
  const int64_t size = int64_t{block.units(l)} * block.inputs(l);
  const int64_t packs = reinterpret_cast<uintptr_t>(w) % 16 == 0 ? size / kSize : 0;
  float top = 0;
#pragma unroll 4
  for (int64_t i = thread(); i < packs; i += threads()) {
    const Pack<float> pack = reinterpret_cast<const Pack<float>*>(w)[i];
#pragma unroll
    for (int c = 0; c < kSize; ++c) top = fmaxf(top, fabsf(pack.at[c]));
  }
  for (int64_t i = packs * kSize + thread(); i < size; i += threads()) top = fmaxf(top, fabsf(w[i]));
  double factor = sqrt(static_cast<double>(size)) * block_max(top, scratch);
  for (int a = block.chain.starts[l]; a < block.chain.starts[l + 1]; ++a) {
    factor *= steepest(block.chain.activations[a]);
  }
  return larger(1.0, factor);
}

// The Frobenius norm from which on a Jacobian's products kept what matters.
__device__ inline double least_norm(const ChainBlock<float>& block, double* scratch) {
  const double outputs = block.chain.widths[block.chain.layers], widest = static_cast<double>(block.layout.widest);
  double least = 0x1p-97 * block.chain.layers * outputs * widest * sqrt(widest);
  for (int l = 0; l < block.chain.layers; ++l) least *= growth(block, l, scratch);
  return least;
}

// product = D_L W_L D_{L-1} for every sample of the tile.
__device__ inline void dense_last_layer(const ChainBlock<float>& block, float* product) {
  const int l = block.chain.layers - 1, outputs = block.units(l), columns = block.inputs(l);
  const uint32_t* words = block.words_of(l);
  const float* w = block.weight(l);
  for (int row = warp(); row < block.count() * outputs; row += warps()) {
    const int sample = row / outputs, k = row % outputs;
    const float *values = block.derivatives_of(l, sample), *below = block.derivatives_of(l - 1, sample);
    const bool open = (words[int64_t{k / kUnits} * block.samples() + sample] >> (k % kUnits) & 1) != 0;
    const float derivative = !open ? 0.0f : values != nullptr ? values[k] : 1.0f;
    float* out = product + row * block.layout.pitch();
    for (int c = lane(); c < static_cast<int>(round_up(columns, kUnits)); c += kWarp) {
      const float factor = below != nullptr && c < columns ? below[c] : 1.0f;
      out[c] = c < columns ? derivative * w[int64_t{k} * columns + c] * factor : 0.0f;
    }
  }
}

// Queues copies of `rows` rows of `width` elements, a power of two; zeros beyond `filled` rows and `columns` columns.
__device__ inline void stage_dense(const float* from, int rows, int filled, int columns, int64_t row_step, int width,
                                   float* to, int stride) {
  constexpr int kSize = Pack<float>::kSize;
  const bool aligned = row_step % kSize == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  const int packs = width / kSize, me = static_cast<int>(thread()), column = me % packs * kSize;
  for (int row = me / packs; row < rows; row += static_cast<int>(threads()) / packs) {
    float* pack = to + row * stride + column;
    const float* source = from + row * row_step + column;
    if (aligned && row < filled && column + kSize <= columns) {
      copy_async<16>(pack, source);
      continue;
    }
    for (int c = 0; c < kSize; ++c) {
      if (row < filled && column + c < columns) {
        copy_async<sizeof(float)>(pack + c, source + c);
      } else {
        pack[c] = 0;
      }
    }
  }
}

// sums[m][n] += the products of a group of units for 16 rows m and 8 columns n, kColumns of them. Tensor cores cut off
// what does not fit: they add up one group only, and its sum is rounded to nearest.
template <int kColumns>
__device__ __forceinline__ void add_dense(const float* product, const float* w, int stride, float (&sums)[2][4][4]) {
  const int group = lane() / 4, member = lane() % 4;
  float parts[2][kColumns][4] = {};
#pragma unroll
  for (int k = 0; k < kUnits; k += 8) {
    Fragment<4> a[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[m].set(i, product[(16 * m + group + i % 2 * 8) * kDenseStride + k + member + i / 2 * 4]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      Fragment<2> b;
#pragma unroll
      for (int i = 0; i < 2; ++i) b.set(i, w[(k + member + 4 * i) * stride + 8 * n + group]);
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_float32(a[m], b, parts[m][n]);
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += parts[m][n][i];
    }
  }
}

// A product next = product W D of layer l for all rows of a tile, and the part of it that the block has at a time: a
// warp has 32 x 32.
struct DenseProduct {
  const float *product, *weight, *values;  // D of one sample after another, or nullptr
  float* next;
  int rows, units, columns, outputs;
  int64_t pitch;
  int across, top, left;
};

__device__ inline void store_dense(const DenseProduct& p, const float (&sums)[2][4][4], int row, int column) {
  struct alignas(8) Neighbours {
    float first, second;
  };
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int at = row + 8 * m + lane() / 4;
    if (at >= p.rows) continue;
    const float* values = p.values != nullptr ? p.values + int64_t{at / p.outputs} * p.columns : nullptr;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int c = column + 8 * n + 2 * (lane() % 4);
      const float* own = sums[m / 2][n] + m % 2 * 2;
      const auto entry = [&](int i) {
        return c + i >= p.columns ? 0.0f : values != nullptr ? own[i] * values[c + i] : own[i];
      };
      *reinterpret_cast<Neighbours*>(p.next + at * p.pitch + c) = {entry(0), entry(1)};
    }
  }
}

// W and the rows pass through shared memory, 32 units at a time, the next ones while these are used.
__device__ inline void multiply_dense_part(const ChainBlock<float>& block, const DenseProduct& p) {
  const int height = kDenseSide * (warps() / p.across), width = kDenseSide * p.across, stride = width + 8;
  const int row = kDenseSide * (warp() / p.across), column = kDenseSide * (warp() % p.across);
  const int here = smaller(height, p.rows - p.top), left = p.columns - p.left - column;
  const bool idle = row >= here || left <= 0;
  const auto queue = [&](int unit, int which) {
    float* to = block.stage(which);
    stage_dense(p.product + p.top * p.pitch + unit, here, here, kUnits, p.pitch, kUnits, to, kDenseStride);
    stage_dense(p.weight + int64_t{unit} * p.columns + p.left, kUnits, p.units - unit, p.columns - p.left, p.columns,
                width, to + height * kDenseStride, stride);
  };
  float sums[2][4][4] = {};
  queue(0, 0);
  copy_async_commit();
  int which = 0;
#pragma unroll 1
  for (int unit = 0; unit < p.units; unit += kUnits, which = 1 - which) {
    if (unit + kUnits < p.units) queue(unit + kUnits, 1 - which);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const float *rows = block.stage(which) + row * kDenseStride,
                *w = block.stage(which) + height * kDenseStride + column;
    if (!idle) {
      if (left > 16) {
        add_dense<4>(rows, w, stride, sums);
      } else if (left > 8) {
        add_dense<2>(rows, w, stride, sums);
      } else {
        add_dense<1>(rows, w, stride, sums);
      }
    }
    __syncthreads();  // before the stage is overwritten
  }
  copy_async_wait<0>();
  if (!idle) store_dense(p, sums, p.top + row, p.left + column);
}

LIPFAST_PHASE inline void multiply_dense(const ChainBlock<float>& block, int l, const float* product, float* next) {
  const int outputs = block.units(block.chain.layers - 1), columns = block.inputs(l);
  DenseProduct p{product,
                 block.weight(l),
                 block.derivatives_of(l - 1, 0),
                 next,
                 block.count() * outputs,
                 block.units(l),
                 columns,
                 outputs,
                 block.layout.pitch(),
                 columns > 2 * kDenseSide ? 4 : 2,
                 0,
                 0};
#pragma unroll 1
  for (p.top = 0; p.top < p.rows; p.top += kDenseSide * (warps() / p.across)) {
#pragma unroll 1
    for (p.left = 0; p.left < columns; p.left += kDenseSide * p.across) multiply_dense_part(block, p);
  }
}

// The Jacobians of all samples of the tile; sets where they are, and the norm that they must have. Begins and ends with
// a barrier.
LIPFAST_PHASE inline void dense_products(const ChainBlock<float>& block) {
  const double least = least_norm(block, reinterpret_cast<double*>(block.stage(0)));
  float *product = block.tile().products, *next = product + block.layout.dense_size();
  dense_last_layer(block, product);
#pragma unroll 1
  for (int l = block.chain.layers - 2; l >= 0; --l) {
    __syncthreads();  // the product is written
    multiply_dense(block, l, product, next);
    float* const swap = product;
    product = next;
    next = swap;
  }
  if (thread() == 0) {
    block.tile().jacobians = product;
    block.tile().least = least;
  }
  __syncthreads();
}

}  // namespace lipfast::cuda

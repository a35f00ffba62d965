// The products of chain_jacobian_norms from the output side: a warp per sample, whose active units alone take part, as
// rows of W and as columns. W passes through shared memory once for all samples of a block.
#pragma once

#include "chain_block.cuh"

namespace lipfast::cuda {

// product = D_L W_L D_{L-1} of this warp's sample, at the active units of layer L - 1.
template <class T>
__device__ void last_layer(const ChainBlock<T>& block, int sample, T* product) {
  const int l = block.chain.layers - 1;
  const int outputs = block.units(l), columns = block.inputs(l), samples = block.samples();
  const uint32_t *words = block.words_of(l), *below = l > 0 ? block.words_of(l - 1) : nullptr;
  const T *values = block.derivatives_of(l, sample), *values_below = block.derivatives_of(l - 1, sample);
  const T* w = block.weight(l);
  for (int word = 0; word * kUnits < columns; ++word) {
    const uint32_t bits = active(below, samples, sample, word, columns);
    if ((bits >> lane() & 1) != 0) {
      const int column = word * kUnits + lane();
      const T factor = values_below != nullptr ? values_below[column] : T(1);
      T* out = product + __popc(bits & lanes_below()) * block.layout.rows;
      for (int k = 0; k < outputs; ++k) {
        const bool open = (words[int64_t{k / kUnits} * samples + sample] >> (k % kUnits) & 1) != 0;
        const T derivative = !open ? T(0) : values != nullptr ? values[k] : T(1);
        out[k] = derivative * w[int64_t{k} * columns + column] * factor;
      }
    }
    product += __popc(bits) * block.layout.rows;
  }
}

// The first group of units at or after `group` in which some sample of the round has an active one.
__device__ inline int next_group(const uint32_t* words, int samples, int first, int count, int groups, int group) {
  for (; group < groups; ++group) {
    if (__ballot_sync(kAllLanes, lane() < count && words[int64_t{group} * samples + first + lane()] != 0) != 0) break;
  }
  return group;
}

// Queues copies of W[group of units][columns from `first`, at most a panel]. Rows that are not aligned to 16 bytes go
// element by element.
template <class T>
__device__ void stage_panel(const T* w, int units, int columns, int group, int first, T* to) {
  constexpr int kSize = Pack<T>::kSize;
  const int here = smaller(kPanel<T>, columns - first);
  const bool aligned = columns % kSize == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
  for (int unit = warp(); unit < smaller(kUnits, units - group * kUnits); unit += warps()) {
    const T* from = w + int64_t{group * kUnits + unit} * columns + first;
    T* row = to + unit * kPanel<T>;
    if (aligned) {
      for (int c = lane() * kSize; c < here; c += kWarp * kSize) copy_async<16>(row + c, from + c);
    } else {
      for (int c = lane(); c < here; c += kWarp) copy_async<sizeof(T)>(row + c, from + c);
    }
  }
}

// Queues copies of rows [row, row + kRows) of `count` columns of a product.
template <class T, int kRows>
__device__ void stage_factors(const T* product, int count, int rows, T* to) {
  constexpr int kSize = Pack<T>::kSize, kPacks = round_to_pack<T>(kRows) / kSize;
  for (int at = lane(); at < count * kPacks; at += kWarp) {
    copy_async<16>(to + at * kSize, product + int64_t{at / kPacks} * rows + at % kPacks * kSize);
  }
}

// How the lanes share the active columns of a panel: `across` of them lie side by side, each with `each` columns; the
// 32 / across sets of lanes take turns at the units, so that few columns leave few lanes idle.
struct Lanes {
  int across, each;
};
template <int kEach>
__device__ Lanes share_columns(int columns) {
  Lanes best{kWarp, (columns + kWarp - 1) / kWarp};
  for (int across = kWarp / 2; across >= 8; across /= 2) {
    const int each = (columns + across - 1) / across;
    if (each <= kEach && across * each < best.across * best.each) best = {across, each};
  }
  return best;
}

// sums[r][c] += sum over the listed units: factors[unit's place][r] w[unit][columns[c]], for c < kEach.
template <class T, int kRows, int kEach, int kMost>
__device__ void add_units(const T* panel, const T* factors, const int32_t* units, int count, int across,
                          const int (&columns)[kMost], T (&sums)[kRows][kMost]) {
  constexpr int kSize = Pack<T>::kSize, kStride = round_to_pack<T>(kRows);
  const int turns = kWarp / across;
  for (int i = lane() / across; i < count; i += turns) {
    const T* row = panel + units[i] * kPanel<T>;
    T w[kEach];
#pragma unroll
    for (int c = 0; c < kEach; ++c) w[c] = row[columns[c]];
#pragma unroll
    for (int r = 0; r < kRows; r += kSize) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(factors + i * kStride + r);
#pragma unroll
      for (int q = 0; q < kSize && r + q < kRows; ++q) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) sums[r + q][c] += pack.at[q] * w[c];
      }
    }
  }
}

// Those with lanes.each of 1 to kMost columns.
template <class T, int kRows, int kMost, int kEach = kMost>
__device__ void add_group(const T* panel, const T* factors, const int32_t* units, int count, Lanes lanes,
                          const int (&columns)[kMost], T (&sums)[kRows][kMost]) {
  if constexpr (kEach > 1) {
    if (lanes.each < kEach) {
      return add_group<T, kRows, kMost, kEach - 1>(panel, factors, units, count, lanes, columns, sums);
    }
  }
  add_units<T, kRows, kEach, kMost>(panel, factors, units, count, lanes.across, columns, sums);
}

// Lists this sample's active columns of a panel, counted from its first; their number. A barrier must follow before the
// list is read.
template <class T>
__device__ int list_columns(const ChainStep<T>& layer, int samples, int sample, int first, int32_t* list) {
  int count = 0;
  for (int at = first; at < smaller(layer.inputs, first + kPanel<T>); at += kUnits) {
    const uint32_t bits = active(layer.words_below, samples, sample, at / kUnits, layer.inputs);
    if ((bits >> lane() & 1) != 0) {
      list[count + __popc(bits & lanes_below())] = at - first + lane();
    }
    count += __popc(bits);
  }
  return count;
}

// next[active column][row ..] = sum over active units: product[unit][row ..] W[unit][column] derivative[column], for
// kRows rows and `count` of the active columns of a panel, the listed ones, which are next[to] and those that follow; W
// comes through shared memory, the next group while this one is used. A barrier of the warp must follow before `next`
// is read or columns are listed anew.
template <class T, int kRows>
__device__ void multiply_columns(const ChainBlock<T>& block, const ChainStep<T>& layer, int round, int to, int first,
                                 int row, const int32_t* listed, int count) {
  constexpr int kEach = kLaneColumns<T, kRows>, kSize = Pack<T>::kSize;
  const int samples = block.samples(), rows = block.rows(), start = round * warps(), sample = start + warp();
  const int together = smaller(warps(), block.count() - start), groups = (layer.units + kUnits - 1) / kUnits;
  const bool given = warp() < together;
  const Lanes lanes = share_columns<kEach>(count);
  int columns[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    const int at = c * lanes.across + lane() % lanes.across;
    columns[c] = at < count ? listed[at] : 0;
  }
  T sums[kRows][kEach] = {};
  int queued = 0;  // active units of the groups before the next
  const auto queue = [&](int group, int which) {
    if (group >= groups) return;
    stage_panel(layer.weight, layer.units, layer.inputs, group, first, block.stage(which));
    if (!given) return;
    const int here = __popc(layer.words[int64_t{group} * samples + sample]);
    stage_factors<T, kRows>(layer.product + int64_t{queued} * rows + row, here, rows, block.factors(which));
    queued += here;
  };
  int group = next_group(layer.words, samples, start, together, groups, 0);
  queue(group, 0);
  copy_async_commit();
  for (int which = 0; group < groups; which = 1 - which) {
    const int following = next_group(layer.words, samples, start, together, groups, group + 1);
    queue(following, 1 - which);
    copy_async_commit();
    copy_async_wait<1>();
    const uint32_t bits = given ? layer.words[int64_t{group} * samples + sample] : 0;
    if ((bits >> lane() & 1) != 0) {
      block.listed_units()[__popc(bits & lanes_below())] = lane();
    }
    __syncthreads();
    if (count > 0) {
      add_group<T, kRows, kEach>(block.stage(which), block.factors(which), block.listed_units(), __popc(bits), lanes,
                                 columns, sums);
    }
    __syncthreads();  // before the stage is overwritten
    group = following;
  }
  copy_async_wait<0>();
  for (int distance = lanes.across; distance < kWarp; distance *= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        if (c < lanes.each) sums[r][c] += __shfl_xor_sync(kAllLanes, sums[r][c], distance);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    const int at = c * lanes.across + lane();
    if (lane() >= lanes.across || at >= count) continue;
    const T derivative = layer.values_below != nullptr ? layer.values_below[first + columns[c]] : T(1);
    T* out = layer.next + int64_t{to + at} * rows + row;
#pragma unroll
    for (int r = 0; r < kRows; r += kSize) {
      Pack<T> pack;
#pragma unroll
      for (int q = 0; q < kSize; ++q)
        pack.at[q] = r + q < kRows ? sums[r + q < kRows ? r + q : 0][c] * derivative : T(0);
      *reinterpret_cast<Pack<T>*>(out + r) = pack;
    }
  }
}

// next = product W D of a layer, over panels of columns.
template <class T, int kRows>
LIPFAST_PHASE void multiply_layer(const ChainBlock<T>& block, int round) {
  constexpr int kTogether = kWarp * kLaneColumns<T, kRows>;
  const ChainStep<T>& layer = block.step();
  const int sample = round * warps() + warp();
  for (int first = 0, to = 0; first < layer.inputs; first += kPanel<T>) {
    const int columns =
        sample < block.count() ? list_columns(layer, block.samples(), sample, first, block.columns()) : 0;
    for (int before = 0; before < kPanel<T>; before += kTogether) {
      const int left = larger(0, columns - before);
      const int wanted = __syncthreads_count(left > 0);  // and the list is written
      if (wanted == 0) break;
#pragma unroll 1
      for (int row = 0; row < block.units(block.chain.layers - 1); row += kRows) {
        multiply_columns<T, kRows>(block, layer, round, to + before, first, row, block.columns() + before,
                                   smaller(left, kTogether));
      }
    }
    to += columns;
    __syncwarp();  // columns are listed anew; where no unit is active, no other barrier is between
  }
}

// The Jacobians of a round's samples, a warp each, from one of its buffers to another; `free` is the third. Returns
// where they are.
template <class T, int kRows>
__device__ int chain_round(const ChainBlock<T>& block, int round, int buffer, int* free) {
  const int sample = round * warps() + warp();
  if (sample < block.count()) last_layer(block, sample, block.product(buffer));
#pragma unroll 1
  for (int l = block.chain.layers - 2; l >= 0; --l) {
    __syncwarp();  // the last product is written, and its step no longer read
    if (lane() == 0) {
      ChainStep<T>& step = block.step();
      step.weight = block.weight(l);
      step.units = block.units(l);
      step.inputs = block.inputs(l);
      step.words = block.words_of(l);
      step.words_below = l > 0 ? block.words_of(l - 1) : nullptr;
      step.values_below = block.derivatives_of(l - 1, sample);
      step.product = block.product(buffer);
      step.next = block.product(*free);
    }
    __syncwarp();
    multiply_layer<T, kRows>(block, round);
    const int swap = buffer;
    buffer = *free;
    *free = swap;
  }
  return buffer;
}

// The Jacobians of all samples of the tile; sets the warps' step().done.
template <class T, int kRows>
LIPFAST_PHASE void chain_products(const ChainBlock<T>& block) {
  int free = 1;
#pragma unroll 1
  for (int round = 0; round < block.layout.rounds; ++round) {
    const int found = chain_round<T, kRows>(block, round, 2 * round, &free);
    if (lane() == 0) block.step().done[round] = found;
  }
}

}  // namespace lipfast::cuda

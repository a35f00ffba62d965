// A chain's stages as layers, the packed weights of a network, and the buffers of one thread.
//
// A layer is a linear map (a linear stage, a convolution, an average pool) and what follows it up to the next one:
// activations and max pools. Those together select: element e of the layer's output is a function of one unit u(e) of
// the map, with derivative f(e). So the gradient with respect to the map's output is never spread out; where it is
// needed, a list names the elements that select a unit.
//
// Images lie pixel by pixel, the channels of a pixel together: a permutation of the Jacobian's columns, which leaves
// its singular values alone. A linear stage is a convolution of an image of one pixel.
#ifndef LIPFAST_CHAIN_LAYERS_INL_H
#define LIPFAST_CHAIN_LAYERS_INL_H

#include "chain_activations-inl.h"
#include "chain_patterns-inl.h"
#include "chain_triangle-inl.h"
#include "panel_product-inl.h"
#include "reduce-inl.h"

struct ChainLayer {
  const ChainStage* map;     // nullptr: the identity, in front of a chain that starts with an activation or a max pool
  int64_t first, end;        // stages that follow
  bool pooled;               // with a max pool among them: u is not the identity
  bool scaled;               // with derivatives other than 0 and 1
  ImageShape in, out;        // of the map
  ImageShape selected;       // of the layer
  int64_t largest;           // elements, between its stages
  bool triangular;           // the product takes the triangle L with L L^T = W W^T instead of W
  int64_t columns;           // of the map's matrix, as the product takes it
  int64_t forward, product;  // offsets of the packed weights
  int64_t patterns;          // of what samples share; the last layer's where they do
  int64_t factors, sources;  // offsets of f and u, for one sample
};

LIPFAST_INLINE bool has_weight(const ChainStage& stage) {
  return stage.kind == StageKind::kLinear || stage.kind == StageKind::kConvolution;
}
LIPFAST_INLINE bool is_map(const ChainStage& stage) {
  return has_weight(stage) || stage.kind == StageKind::kAveragePool;
}

// The convolution that products from the output side run: `block` pixels of a row and their channels together are the
// columns, which fills the vectors where there are few channels. Tap t along the width joins the block that starts at
// pixel x with the output at x + padding + block - 1 - t.
struct ProductShape {
  int64_t block, taps_x, rows, columns;  // rows: terms of one group, columns: of one group
};

template <class T>
ProductShape product_shape(const ChainStage& stage) {
  const int64_t channels = stage.in.channels / stage.groups, units = stage.out.channels / stage.groups;
  ProductShape best{1, stage.kernel[1], stage.kernel[0] * stage.kernel[1] * units, channels};
  if (stage.groups > 1 || stage.stride[1] > 1 || stage.dilation[1] > 1) return best;
  // Share of the multiplications that count.
  double share = static_cast<double>(channels) / static_cast<double>(round_up(channels, Simd<T>::kLanes));
  for (int64_t block = 2; block * channels <= kColumns<T> && block <= stage.in.width; ++block) {
    const int64_t taps = stage.kernel[1] + block - 1, columns = block * channels;
    const double filled = static_cast<double>(columns) / static_cast<double>(round_up(columns, Simd<T>::kLanes));
    const double candidate = filled * static_cast<double>(stage.kernel[1]) / static_cast<double>(taps);
    if (candidate > 1.1 * share) {
      share = candidate;
      best = {block, taps, stage.kernel[0] * taps * units, columns};
    }
  }
  return best;
}

LIPFAST_INLINE int64_t forward_terms(const ChainStage& stage) {
  return stage.kernel[0] * stage.kernel[1] * (stage.in.channels / stage.groups);
}
template <class T>
int64_t forward_size(const ChainStage& stage) {
  return stage.groups * packed_size<T>(forward_terms(stage), stage.out.channels / stage.groups);
}
// Rows of Jacobians are apart by whole vectors, an odd number of them: rows at a power of two would share cache sets.
template <class T>
LIPFAST_INLINE int64_t row_stride(int64_t columns) {
  return (round_up(columns + kColumns<T>, Simd<T>::kLanes) / Simd<T>::kLanes | 1) * Simd<T>::kLanes;
}
// The last linear stage's rows are where the product starts: plain rows.
LIPFAST_INLINE bool starts_product(const ChainParams& p, const ChainStage& stage) {
  return stage.kind == StageKind::kLinear && stage.affine == p.affine - 1;
}
template <class T>
int64_t product_size(const ChainParams& p, const ChainStage& stage) {
  if (starts_product(p, stage)) return stage.out.channels * row_stride<T>(stage.in.channels);
  const ProductShape shape = product_shape<T>(stage);
  return stage.groups * packed_size<T>(shape.rows, shape.columns);
}

// Whether samples share terms of the first product: the chain ends with a linear stage, units that are on or off, and
// another linear stage, there are samples enough to find some that resemble one another, and units enough for their
// terms to take longer than looking for them. The upper bound on units keeps rounding away from the magnitudes' check.
constexpr int64_t kFewestSharing = 16;
constexpr int64_t kFewestPatternUnits = 32, kMostPatternUnits = 1 << 14;
LIPFAST_INLINE bool shares_terms(const ChainParams& p) {
  int64_t s = p.stages - 1;
  while (s > 0 && p.stage[s].kind == StageKind::kActivation) --s;
  const ChainStage& last = p.stage[s];
  if (last.kind != StageKind::kLinear || last.out.channels > kSmallSide || last.in.channels < kFewestPatternUnits ||
      last.in.channels > kMostPatternUnits) {
    return false;
  }
  const int64_t activations = s;
  while (--s >= 0 && p.stage[s].kind == StageKind::kActivation && is_selecting(p.stage[s])) {
  }
  return p.batch >= kFewestSharing && s >= 0 && s + 1 < activations && p.stage[s].kind == StageKind::kLinear;
}

// Reads the layers one by one.
template <class T>
struct LayerReader {
  const ChainParams& p;
  int64_t stage = 0, packed = 0, kept = 0, columns = 0;

  bool next(ChainLayer& layer) {
    if (stage == p.stages) return false;
    const ChainStage& head = p.stage[stage];
    layer = {};
    const bool leading = stage == 0;
    layer.map = is_map(head) ? &head : nullptr;
    layer.in = head.in;
    layer.out = layer.selected = layer.map != nullptr ? head.out : head.in;
    stage += layer.map != nullptr;
    layer.first = stage;
    layer.largest = elements(layer.out);
    layer.triangular = leading && head.kind == StageKind::kLinear && !starts_product(p, head) && triangle_pays(p, head);
    layer.columns = layer.triangular ? head.out.channels : elements(head.in);
    for (; stage < p.stages && !is_map(p.stage[stage]); ++stage) {
      const ChainStage& follower = p.stage[stage];
      layer.pooled = layer.pooled || follower.kind == StageKind::kMaxPool;
      layer.scaled = layer.scaled || (follower.kind == StageKind::kActivation && !is_selecting(follower));
      layer.selected = follower.out;
      layer.largest = larger(layer.largest, elements(follower.out));
    }
    layer.end = stage;
    if (layer.map != nullptr && has_weight(*layer.map)) {
      layer.forward = packed;
      layer.product = packed + forward_size<T>(*layer.map);
      packed = layer.product +
               (layer.triangular ? packed_size<T>(layer.columns, layer.columns) : product_size<T>(p, *layer.map));
      layer.patterns = packed;
      if (starts_product(p, *layer.map) && shares_terms(p)) {
        packed += patterns_size<T>(layer.in.channels, layer.out.channels, columns);
      }
      columns = layer.columns;
    }
    layer.factors = layer.sources = kept;
    kept += round_up(layer.largest, Simd<T>::kLanes);
    return true;
  }
};

// Forward panels of a convolution: rows (kernel offset, channel), columns output channels; product panels: rows
// (kernel offset, output channel), columns (pixel of the block, channel). One matrix per group.
template <class T>
void pack_convolution(const ChainStage& stage, const T* w, T* forward, T* product) {
  const int64_t channels = stage.in.channels / stage.groups, units = stage.out.channels / stage.groups;
  const int64_t taps_y = stage.kernel[0], taps_x = stage.kernel[1], taps = taps_y * taps_x;
  const int64_t unit_step = channels * taps, terms = forward_terms(stage);
  const ProductShape shape = product_shape<T>(stage);
  for (int64_t group = 0; group < stage.groups; ++group, w += units * unit_step) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      pack_block(w + tap, channels, units, taps, unit_step, forward, terms, units, tap * channels, 0);
    }
    forward += packed_size<T>(terms, units);
    for (int64_t y = 0; y < taps_y; ++y) {
      for (int64_t t = 0; t < shape.taps_x; ++t) {
        for (int64_t i = 0; i < shape.block; ++i) {
          const int64_t x = t - (shape.block - 1 - i);
          if (x < 0 || x >= taps_x) continue;
          pack_block(w + y * taps_x + x, units, channels, unit_step, taps, product, shape.rows, shape.columns,
                     (y * shape.taps_x + t) * units, i * channels);
        }
      }
    }
    product += packed_size<T>(shape.rows, shape.columns);
  }
}

template <class T>
void pack_linear(const ChainParams& p, const ChainLayer& layer, const T* w, T* forward, T* product) {
  const ChainStage& stage = *layer.map;
  const int64_t inputs = stage.in.channels, units = stage.out.channels, pixels = stage.pixels;
  const int64_t channels = inputs / pixels, stride = row_stride<T>(inputs);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T* from = w + pixel;
    pack_block(from, channels, units, pixels, inputs, forward, inputs, units, pixel * channels, 0);
    if (layer.triangular) continue;
    if (!starts_product(p, stage)) {
      pack_block(from, units, channels, inputs, pixels, product, units, inputs, 0, pixel * channels);
      continue;
    }
    for (int64_t k = 0; k < units; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        product[k * stride + pixel * channels + c] = from[k * inputs + c * pixels];
      }
    }
  }
}

// Packs the layers from `begin` up to `end`.
template <class T>
void pack_layers(const ChainParams& p, int64_t network, int64_t begin, int64_t end, T* packed) {
  LayerReader<T> reader{p};
  ChainLayer layer;
  for (int64_t l = 0; l < end && reader.next(layer); ++l) {
    if (l < begin || layer.map == nullptr || !has_weight(*layer.map)) continue;
    const int64_t size = (layer.triangular ? layer.product : reader.packed) - layer.forward;
    memset(packed + layer.forward, 0, sizeof(T) * static_cast<size_t>(size));
    const T* w = static_cast<const T*>(p.weights[network * p.affine + layer.map->affine]);
    T *forward = packed + layer.forward, *product = packed + layer.product;
    if (layer.map->kind == StageKind::kLinear) {
      pack_linear(p, layer, w, forward, product);
    } else {
      pack_convolution(*layer.map, w, forward, product);
    }
  }
}

template <class T>
void pack_shared(const ChainParams& p, int64_t network, T* packed) {
  LayerReader<T> reader{p};
  ChainLayer layer, before;
  for (before = {}; reader.next(layer) && (layer.map == nullptr || !starts_product(p, *layer.map)); before = layer) {
  }
  pack_patterns(static_cast<const T*>(p.weights[network * p.affine + layer.map->affine]), layer.in.channels,
                layer.out.channels, packed + before.product, before.columns, packed + layer.patterns);
}

// work: triangle_size() doubles if the first layer is triangular.
template <class T>
void pack_maps(const ChainParams& p, int64_t network, T* packed, double* work, const Parallel* parallel) {
  LayerReader<T> reader{p};
  ChainLayer first{};
  reader.next(first);
  if (!first.triangular) {
    pack_layers(p, network, 0, p.stages, packed);
    return;
  }
  const float* w = static_cast<const float*>(p.weights[network * p.affine]);
  for_items(parallel, kSlices + 2, [&](int64_t item) {
    if (item < kSlices) {
      triangle_slice(w, first.columns, first.map->in.channels, item, work);
    } else if (item == kSlices) {
      pack_layers(p, network, 0, 1, packed);
    } else {
      pack_layers(p, network, 1, p.stages, packed);
    }
  });
  if constexpr (sizeof(T) == sizeof(float)) {
    pack_triangle(first.columns, packed + first.product, work, parallel);
  }
}

template <class T>
void pack_chain(const ChainParams& p, int64_t network, void* packed, double* work, const Parallel* parallel) {
  pack_maps(p, network, static_cast<T*>(packed), work, parallel);
  if (shares_terms(p)) pack_shared(p, network, static_cast<T*>(packed));
}

// Samples of one tile: they share the forward pass's reads of the weights, and terms of the first product where a chain
// allows that; more tiles than kFewestTiles, so that every thread gets some.
constexpr int64_t kMaxTile = 8, kMaxSharingTile = 64, kFewestTiles = 16;
constexpr int64_t kTileBytes = 1 << 21;  // of their buffers, per thread
LIPFAST_INLINE int64_t largest_tile(const ChainParams& p) {
  if (!shares_terms(p)) return kMaxTile;
  const int64_t even = round_up((p.batch + kFewestTiles - 1) / kFewestTiles, kMaxTile);
  return smaller(kMaxSharingTile, even);
}

// Buffers of one thread.
template <class T>
struct ChainBuffers {
  int64_t layers, tile, outputs, inputs;
  int64_t kept;    // factors and sources of a sample
  int64_t width;   // of a sample's activations
  int64_t stride;  // of a row of a Jacobian
  ChainLayer* layer;
  T *activations, *spare;  // tile x width each
  T* padded;               // one sample's input of a convolution
  T *factors, *pooled_factors;
  int32_t *sources, *pooled_sources;
  bool* defined;                        // no output is NaN
  int32_t *left, *right;                // terms of one product
  int32_t *sorted_left, *sorted_right;  // terms by output pixel and group, those of bucket b from begin[b]
  int32_t* begin;
  int32_t* active;   // tile x most_units: units of a linear stage with a derivative other than zero
  int64_t* actives;  // how many of them, and where those start that the current panel needs
  int64_t most_units;
  bool shares;         // terms of the first product; what follows is for that, per sample of the tile
  T* magnitudes;       // stride
  uint64_t* patterns;  // words
  Changes* changes;
  int32_t *order, *from, *steps, *distance;
  bool* exact;
  T *rows, *product;  // tile x outputs x stride each
  double* reduce;

  // Lays the buffers out from `base` (nullptr: only measures). Returns the bytes taken.
  int64_t place(const ChainParams& p, char* base);
};

LIPFAST_INLINE int64_t padded_size(const ChainStage& stage) {
  return stage.in.channels * (stage.in.height + 2 * stage.padding[0]) * (stage.in.width + 2 * stage.padding[1]);
}

template <class T>
int64_t ChainBuffers<T>::place(const ChainParams& p, char* base) {
  LayerReader<T> reader{p};
  int64_t most_terms = 0, largest = elements(p.in), most_buckets = 0, most_padded = 0;
  int64_t columns = 0;
  most_units = 0;
  layers = 0;
  bool pooled = false;
  for (ChainLayer each; reader.next(each); ++layers) {
    if (layers == 0) columns = each.columns;
    largest = larger(largest, each.largest);
    most_terms = larger(most_terms, elements(each.selected));
    pooled = pooled || each.pooled;
    if (each.map == nullptr || !has_weight(*each.map)) continue;
    most_terms = larger(most_terms, forward_terms(*each.map));
    if (each.map->kind == StageKind::kLinear)
      most_units = larger(most_units, round_up(each.map->out.channels, kIndices));
    most_buckets = larger(most_buckets, each.out.height * each.out.width * each.map->groups);
    most_padded = larger(most_padded, padded_size(*each.map));
  }
  kept = reader.kept;
  width = row_stride<T>(largest);
  stride = width;
  outputs = elements(p.out);
  inputs = columns;
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * (2 * outputs * stride + 2 * width + kept);
  const int64_t fit = kTileBytes / larger<int64_t>(bytes, 1), most = largest_tile(p);
  // Whole groups of lanes, so that the reduction is the same wherever a tile ends.
  tile = fit >= most ? most : larger<int64_t>(fit / kDoubles * kDoubles, 1);
  shares = shares_terms(p) && tile > 1;

  int64_t used = 0;
  const auto take_one = [&](int64_t count, auto*& pointer) {
    pointer = reinterpret_cast<decltype(+pointer)>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(*pointer)), 64);
  };
  const auto take = [&](int64_t count, auto*&... pointers) { (take_one(count, pointers), ...); };
  take(layers, layer);
  take(tile * width, activations, spare);
  take(most_padded, padded);
  take(tile * kept, factors);
  take(pooled ? tile * kept : 0, sources);
  take(pooled ? largest : 0, pooled_factors, pooled_sources);
  take(tile, defined);
  // Terms are copied in whole vectors.
  take(most_terms + kIndices, left, right, sorted_left, sorted_right);
  take(most_buckets + 1, begin);
  take(tile * most_units, active);
  take(2 * tile, actives);
  const int64_t sharing = shares ? tile : 0;
  take(sharing * stride, magnitudes);
  take(sharing * ((most_units + 63) / 64), patterns);
  take(sharing, changes, order, from, steps, distance, exact);
  take(tile * outputs * stride, rows, product);
  take(reduce_size(outputs, inputs), reduce);
  if (base != nullptr) {
    LayerReader<T> again{p};
    for (int64_t l = 0; l < layers; ++l) again.next(layer[l]);
  }
  return used;
}

#endif

// The product J_S ... J_1 of one sample, from the output side: K rows pass back through the layers.
#ifndef LIPFAST_CHAIN_BACKWARD_INL_H
#define LIPFAST_CHAIN_BACKWARD_INL_H

#include "chain_forward-inl.h"
#include "chain_layers-inl.h"
#include "chain_linear-inl.h"
#include "chain_shared-inl.h"
#include "panel_product-inl.h"

// Rows [0, rows) of g times the derivatives, in `out`.
template <class T>
void scale_columns(const T* g, int64_t rows, int64_t stride, const T* factors, int64_t count, T* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t k = 0; k < rows; ++k, g += stride, out += stride) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(g + i) * load(factors + i));
    for (; i < count; ++i) out[i] = g[i] * factors[i];
  }
}

// The elements with a derivative other than zero, by the pixel and group of the unit that they select: those of bucket
// b are [begin[b], begin[b + 1]) of sorted_left, ordered by unit; sorted_right is the unit within its group.
template <class T>
void sort_terms(const ImageShape& units, int64_t groups, const Selection<T>& selection, ChainBuffers<T>& buffers) {
  const int64_t buckets = units.height * units.width * groups, size = units.channels / groups;
  int32_t *begin = buffers.begin, *left = buffers.sorted_left, *right = buffers.sorted_right;
  if (selection.sources == nullptr) {
    int32_t count = 0;
    for (int64_t bucket = 0, e = 0; bucket < buckets; ++bucket) {
      begin[bucket] = count;
      for (int64_t i = 0; i < size; ++i, ++e) {
        left[count] = static_cast<int32_t>(e);
        right[count] = static_cast<int32_t>(i);
        count += selection.factors[e] != 0;
      }
    }
    begin[buckets] = count;
    return;
  }
  // Counting sort: begin[b + 1] first counts, then tells where the bucket's next term goes.
  memset(begin, 0, sizeof(int32_t) * static_cast<size_t>(buckets + 1));
  const auto width = static_cast<int32_t>(size);
  for (int64_t e = 0; e < selection.count; ++e) begin[selection.sources[e] / width + 1] += selection.factors[e] != 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) begin[bucket + 1] += begin[bucket];
  for (int64_t e = 0; e < selection.count; ++e) {
    if (selection.factors[e] == 0) continue;
    const int32_t unit = selection.sources[e], bucket = unit / width;
    const int32_t at = begin[bucket]++;
    left[at] = static_cast<int32_t>(e);
    right[at] = unit - bucket * width;
  }
  for (int64_t bucket = buckets; bucket > 0; --bucket) begin[bucket] = begin[bucket - 1];
  begin[0] = 0;
}

// The output position along an axis that kernel position `tap` joins with input position `at` (which includes the
// padding), or -1.
LIPFAST_INLINE int64_t output_position(int64_t at, int64_t tap, int64_t dilation, int64_t stride, int64_t size) {
  const int64_t shifted = at - tap * dilation;
  if (shifted < 0 || shifted >= size * stride) return -1;
  if (stride == 1) return shifted;  // a division costs as much as a term
  return shifted % stride == 0 ? shifted / stride : -1;
}

// Appends terms [from, end) of the sorted list, `base` rows further down; whole vectors at a time.
template <class T>
LIPFAST_INLINE int64_t append_terms(int64_t from, int64_t end, int32_t base, int64_t count, ChainBuffers<T>& buffers) {
  for (int64_t i = from; i < end; i += kIndices) {
    typedef IndexVectorUnaligned Vector;
    *reinterpret_cast<Vector*>(buffers.left + count + i - from) =
        *reinterpret_cast<const Vector*>(buffers.sorted_left + i);
    *reinterpret_cast<Vector*>(buffers.right + count + i - from) =
        *reinterpret_cast<const Vector*>(buffers.sorted_right + i) + base;
  }
  return count + end - from;
}

// What contributes to the block of input pixels at (y, x).
template <class T>
Terms gather_terms(const ChainStage& stage, const ProductShape& shape, int64_t group, int64_t y, int64_t x,
                   ChainBuffers<T>& buffers) {
  const int64_t units = stage.out.channels / stage.groups;
  const int64_t right_end = x + stage.padding[1] + (shape.block - 1) * stage.dilation[1];
  int64_t count = 0;
  for (int64_t tap_y = 0; tap_y < stage.kernel[0]; ++tap_y) {
    const int64_t row =
        output_position(y + stage.padding[0], tap_y, stage.dilation[0], stage.stride[0], stage.out.height);
    if (row < 0) continue;
    for (int64_t tap_x = 0; tap_x < shape.taps_x; ++tap_x) {
      const int64_t column = output_position(right_end, tap_x, stage.dilation[1], stage.stride[1], stage.out.width);
      if (column < 0) continue;
      const int32_t* begin = buffers.begin + (row * stage.out.width + column) * stage.groups + group;
      const auto base = static_cast<int32_t>((tap_y * shape.taps_x + tap_x) * units);
      count = append_terms(begin[0], begin[1], base, count, buffers);
    }
  }
  return {buffers.left, buffers.right, count};
}

// Output-stationary: for a block of input pixels, all contributions to a panel of their channels at once. Surplus
// columns of a panel run over into what is stored next.
template <class T>
void product_convolution(const ChainStage& stage, const T* packed, const T* g, const Selection<T>& selection, T* out,
                         ChainBuffers<T>& buffers) {
  const ProductShape shape = product_shape<T>(stage);
  const int64_t channels = stage.in.channels / stage.groups;
  sort_terms(stage.out, stage.groups, selection, buffers);
  for (int64_t y = 0; y < stage.in.height; ++y) {
    for (int64_t x = 0; x < stage.in.width; x += shape.block) {
      T* to = out + (y * stage.in.width + x) * stage.in.channels;
      for (int64_t group = 0; group < stage.groups; ++group) {
        const T* w = packed + group * packed_size<T>(shape.rows, shape.columns);
        const Terms terms = gather_terms(stage, shape, group, y, x, buffers);
        for (int64_t j = 0; j < shape.columns; j += kColumns<T>) {
          all_rows_times_panel(g, buffers.outputs, buffers.stride, terms, panel_at<T>(w, shape.rows, j),
                               panel_width<T>(shape.columns - j), to + group * channels + j, buffers.stride);
        }
      }
    }
  }
}

template <class T>
void clear_rows(int64_t columns, T* out, const ChainBuffers<T>& buffers) {
  for (int64_t k = 0; k < buffers.outputs; ++k) {
    memset(out + k * buffers.stride, 0, sizeof(T) * static_cast<size_t>(columns));
  }
}

// out: rows over the units of a map, from rows over the elements that select them.
template <class T>
void spread_selection(const T* g, const Selection<T>& selection, int64_t units, T* out,
                      const ChainBuffers<T>& buffers) {
  clear_rows(units, out, buffers);
  for (int64_t k = 0; k < buffers.outputs; ++k, g += buffers.stride, out += buffers.stride) {
    for (int64_t e = 0; e < selection.count; ++e) out[selection.source(e)] += g[e] * selection.factors[e];
  }
}

template <class T>
void product_average(const ChainStage& stage, const T* g, T* out, const ChainBuffers<T>& buffers) {
  const int64_t channels = stage.in.channels;
  clear_rows(elements(stage.in), out, buffers);
  for (int64_t k = 0; k < buffers.outputs; ++k, out += buffers.stride) {
    const T* from = g + k * buffers.stride;
    for (int64_t y = 0; y < stage.out.height; ++y) {
      const Window rows = window_of(stage, 0, y, stage.in.height);
      for (int64_t x = 0; x < stage.out.width; ++x, from += channels) {
        const Window columns = window_of(stage, 1, x, stage.in.width);
        const auto divisor = static_cast<T>(window_divisor(stage, 0, rows, stage.in.height) *
                                            window_divisor(stage, 1, columns, stage.in.width));
        for (int64_t i = rows.first; i < rows.end; ++i) {
          for (int64_t j = columns.first; j < columns.end; ++j) {
            T* to = out + ((rows.start + i) * stage.in.width + columns.start + j) * channels;
            for (int64_t c = 0; c < channels; ++c) to[c] += from[c] / divisor;
          }
        }
      }
    }
  }
}

// Where the product of sample t starts: with the rows of a last linear stage, each times the derivative of its output,
// else with the identity.
template <class T>
void first_rows(const ChainLayer& last, bool linear, const T* packed, int64_t t, T* rows,
                const ChainBuffers<T>& buffers) {
  const int64_t outputs = buffers.outputs, stride = buffers.stride;
  if (!linear) {
    clear_rows(outputs, rows, buffers);
    for (int64_t k = 0; k < outputs; ++k) rows[k * stride + k] = 1;
    return;
  }
  const int64_t inputs = last.map->in.channels, packed_stride = row_stride<T>(inputs);
  const Selection<T> selection(last, t, buffers);
  for (int64_t k = 0; k < outputs; ++k) {
    const T* from = packed + last.product + k * packed_stride;
    const T factor = selection.factors[k];
    for (int64_t j = 0; j < inputs; ++j) rows[k * stride + j] = factor * from[j];
  }
}

// Average pools, convolutions and leading selections, of sample t. `g` may be overwritten.
template <class T>
void product_layer(const ChainLayer& layer, const T* packed, int64_t t, T* g, T* out, ChainBuffers<T>& buffers) {
  const Selection<T> selection(layer, t, buffers);
  if (layer.map == nullptr) {
    spread_selection(g, selection, elements(layer.out), out, buffers);
  } else if (layer.map->kind == StageKind::kConvolution) {
    product_convolution(*layer.map, packed + layer.product, g, selection, out, buffers);
  } else if (layer.first == layer.end) {
    product_average(*layer.map, g, out, buffers);
  } else {
    spread_selection(g, selection, elements(layer.out), out, buffers);
    product_average(*layer.map, out, g, buffers);
    memcpy(out, g, sizeof(T) * static_cast<size_t>(buffers.outputs * buffers.stride));
  }
}

template <class T>
void scale_rows(const T* factors, int64_t columns, T* rows, const ChainBuffers<T>& buffers) {
  for (int64_t k = 0; k < buffers.outputs; ++k, rows += buffers.stride) {
    if (factors[k] == 1) continue;
    for (int64_t j = 0; j < columns; ++j) rows[j] = factors[k] == 0 ? 0 : factors[k] * rows[j];
  }
}

// `out`: the rows of all samples after the last two linear stages; `rows`: scratch.
template <class T>
void first_product(const T* packed, int64_t samples, T* rows, T* out, ChainBuffers<T>& buffers) {
  const int64_t size = buffers.outputs * buffers.stride;
  const ChainLayer &last = buffers.layer[buffers.layers - 1], &layer = buffers.layer[buffers.layers - 2];
  product_shared(layer, packed + layer.product, packed + last.patterns, samples, out, buffers);
  for (int64_t t = 0; t < samples; ++t) {
    if (!buffers.exact[t]) {
      first_rows(last, true, packed, t, rows + t * size, buffers);
      product_linear(layer, packed + layer.product, t, t + 1, rows, out, buffers);
    } else if (last.first < last.end) {
      scale_rows(Selection<T>(last, t, buffers).factors, layer.columns, out + t * size, buffers);
    }
  }
}

// The Jacobians of the tile's samples: K rows each, `stride` apart. The rows alternate between two buffers.
template <class T>
const T* chain_products(const ChainParams& p, const T* packed, int64_t samples, ChainBuffers<T>& buffers) {
  const int64_t outputs = buffers.outputs, stride = buffers.stride, size = outputs * stride;
  T *g = buffers.rows, *out = buffers.product;
  const ChainLayer& last = buffers.layer[buffers.layers - 1];
  const bool linear = last.map != nullptr && starts_product(p, *last.map);
  int64_t l = buffers.layers - 1 - linear;
  if (buffers.shares) {
    first_product(packed, samples, out, g, buffers);
    --l;
  } else {
    for (int64_t t = 0; t < samples; ++t) first_rows(last, linear, packed, t, g + t * size, buffers);
  }
  for (; l >= 0; --l) {
    const ChainLayer& layer = buffers.layer[l];
    const bool weighted = layer.map != nullptr && has_weight(*layer.map);
    for (int64_t t = 0; t < samples && weighted && layer.scaled; ++t) {
      const Selection<T> selection(layer, t, buffers);
      scale_columns(g + t * size, outputs, stride, selection.factors, selection.count, g + t * size);
    }
    if (weighted && layer.map->kind == StageKind::kLinear) {
      product_linear(layer, packed + layer.product, 0, samples, g, out, buffers);
    } else {
      for (int64_t t = 0; t < samples; ++t) product_layer(layer, packed, t, g + t * size, out + t * size, buffers);
    }
    exchange(g, out);
  }
  return g;
}

#endif

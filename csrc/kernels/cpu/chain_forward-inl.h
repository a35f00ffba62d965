// Forward pass of a tile of samples; keeps for every layer which unit each element selects (u) and its derivative (f).
#ifndef LIPFAST_CHAIN_FORWARD_INL_H
#define LIPFAST_CHAIN_FORWARD_INL_H

#include "chain_activations-inl.h"
#include "chain_layers-inl.h"
#include "panel_product-inl.h"

// z = W h + b for the samples of the tile, as rows of one product.
template <class T>
void forward_linear(const ChainStage& stage, const T* packed, int64_t count, ChainBuffers<T>& buffers) {
  const int64_t inputs = stage.in.channels, units = stage.out.channels, width = buffers.width;
  for (int64_t i = 0; i < inputs; ++i) buffers.left[i] = static_cast<int32_t>(i);
  const Terms terms{buffers.left, buffers.left, inputs};
  for (int64_t j = 0; j < units; j += kColumns<T>) {
    all_rows_times_panel(buffers.activations, count, width, terms, panel_at<T>(packed, inputs, j),
                         panel_width<T>(units - j), buffers.spare + j, width);
  }
}

template <class T>
void pad_image(const ChainStage& stage, const T* h, T* padded) {
  const int64_t row = stage.in.width * stage.in.channels, margin = stage.padding[1] * stage.in.channels;
  memset(padded, 0, sizeof(T) * static_cast<size_t>(padded_size(stage)));
  T* to = padded + stage.padding[0] * (row + 2 * margin) + margin;
  for (int64_t y = 0; y < stage.in.height; ++y, h += row, to += row + 2 * margin) {
    memcpy(to, h, sizeof(T) * static_cast<size_t>(row));
  }
}

// One sample: the pixels of an output row are the rows of the product. A panel's surplus columns run over into the
// next pixel, whose own values are stored later: panels from the last to the first, rows in order. With groups they
// run over into the next group, so that pixels pass one by one.
template <class T>
void forward_convolution(const ChainStage& stage, const T* packed, const T* h, T* z, ChainBuffers<T>& buffers) {
  const int64_t all_channels = stage.in.channels, channels = all_channels / stage.groups;
  const int64_t all_units = stage.out.channels, units = all_units / stage.groups;
  const int64_t padded_width = stage.in.width + 2 * stage.padding[1], count = forward_terms(stage);
  int64_t term = 0;
  for (int64_t y = 0; y < stage.kernel[0]; ++y) {
    for (int64_t x = 0; x < stage.kernel[1]; ++x) {
      const int64_t at = (y * stage.dilation[0] * padded_width + x * stage.dilation[1]) * all_channels;
      for (int64_t c = 0; c < channels; ++c, ++term) {
        buffers.left[term] = static_cast<int32_t>(at + c);
        buffers.right[term] = static_cast<int32_t>(term);
      }
    }
  }
  const Terms terms{buffers.left, buffers.right, count};
  pad_image(stage, h, buffers.padded);
  const int64_t last = (units - 1) / kColumns<T> * kColumns<T>;
  const int64_t run = stage.groups > 1 ? 1 : stage.out.width, step = stage.stride[1] * all_channels;
  for (int64_t y = 0; y < stage.out.height; ++y) {
    for (int64_t x = 0; x < stage.out.width; x += run) {
      const T* from = buffers.padded + y * stage.stride[0] * padded_width * all_channels + x * step;
      T* to = z + (y * stage.out.width + x) * all_units;
      for (int64_t group = 0; group < stage.groups; ++group) {
        const T* w = packed + group * packed_size<T>(count, units);
        for (int64_t j = last; j >= 0; j -= kColumns<T>) {
          all_rows_times_panel(from + group * channels, run, step, terms, panel_at<T>(w, count, j),
                               panel_width<T>(units - j), to + group * units + j, all_units);
        }
      }
    }
  }
}

// Pixels of an axis that a window covers: kernel positions [first, end), and the first pixel's index.
struct Window {
  int64_t first, end, start;
};
LIPFAST_INLINE Window window_of(const ChainStage& stage, int axis, int64_t position, int64_t size) {
  Window w{0, stage.kernel[axis], position * stage.stride[axis] - stage.padding[axis]};
  while (w.first < w.end && w.start + w.first * stage.dilation[axis] < 0) ++w.first;
  while (w.end > w.first && w.start + (w.end - 1) * stage.dilation[axis] >= size) --w.end;
  return w;
}

// Divisor of an average pool's window along one axis; the window may reach beyond the padding in ceil mode.
LIPFAST_INLINE int64_t window_divisor(const ChainStage& stage, int axis, const Window& w, int64_t size) {
  if (!stage.count_include_pad) return w.end - w.first;
  return smaller(w.start + stage.kernel[axis], size + stage.padding[axis]) - w.start;
}

template <class T>
void forward_average(const ChainStage& stage, const T* h, T* z) {
  const int64_t channels = stage.in.channels;
  for (int64_t y = 0; y < stage.out.height; ++y) {
    const Window rows = window_of(stage, 0, y, stage.in.height);
    for (int64_t x = 0; x < stage.out.width; ++x, z += channels) {
      const Window columns = window_of(stage, 1, x, stage.in.width);
      const int64_t divisor =
          window_divisor(stage, 0, rows, stage.in.height) * window_divisor(stage, 1, columns, stage.in.width);
      for (int64_t c = 0; c < channels; ++c) z[c] = 0;
      for (int64_t i = rows.first; i < rows.end; ++i) {
        for (int64_t j = columns.first; j < columns.end; ++j) {
          const T* from = h + ((rows.start + i) * stage.in.width + columns.start + j) * channels;
          for (int64_t c = 0; c < channels; ++c) z[c] += from[c];
        }
      }
      for (int64_t c = 0; c < channels; ++c) z[c] /= static_cast<T>(divisor);
    }
  }
}

// z: maxima, index: the pixel of each, the first of equal ones; a NaN counts as the largest, as in torch.
template <class T>
void maximum_of_windows(const ChainStage& stage, const T* h, T* z, int32_t* index) {
  const int64_t channels = stage.in.channels;
  for (int64_t y = 0; y < stage.out.height; ++y) {
    const Window rows = window_of(stage, 0, y, stage.in.height);
    for (int64_t x = 0; x < stage.out.width; ++x, z += channels, index += channels) {
      const Window columns = window_of(stage, 1, x, stage.in.width);
      bool first = true;
      for (int64_t i = rows.first; i < rows.end; ++i) {
        for (int64_t j = columns.first; j < columns.end; ++j) {
          const auto pixel = static_cast<int32_t>((rows.start + i * stage.dilation[0]) * stage.in.width +
                                                  columns.start + j * stage.dilation[1]);
          const T* from = h + pixel * channels;
          for (int64_t c = 0; c < channels; ++c) {
            const bool takes = first || from[c] > z[c] || from[c] != from[c];
            z[c] = takes ? from[c] : z[c];
            index[c] = takes ? pixel : index[c];
          }
          first = false;
        }
      }
    }
  }
}

// The maxima take over the factors and sources of the elements that they are.
template <class T>
void forward_maximum(const ChainStage& stage, bool first_pool, const T* h, T* z, T* factors, int32_t* sources,
                     ChainBuffers<T>& buffers) {
  const int64_t channels = stage.in.channels, count = elements(stage.out);
  int32_t* index = buffers.pooled_sources;
  maximum_of_windows(stage, h, z, index);
  for (int64_t e = 0; e < count; e += channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t from = index[e + c] * channels + c;
      buffers.pooled_factors[e + c] = factors[from];
      index[e + c] = first_pool ? static_cast<int32_t>(from) : sources[from];
    }
  }
  memcpy(factors, buffers.pooled_factors, sizeof(T) * static_cast<size_t>(count));
  memcpy(sources, index, sizeof(int32_t) * static_cast<size_t>(count));
}

// A sample's image, channel by channel in memory, pixel by pixel in `h`.
template <class T>
void read_sample(const ChainParams& p, int64_t sample, T* h) {
  const int64_t pixels = p.in.height * p.in.width, channels = p.in.channels;
  const T* x = static_cast<const T*>(p.x) + sample * pixels * channels;
  if (pixels == 1 || channels == 1) {
    memcpy(h, x, sizeof(T) * static_cast<size_t>(pixels * channels));
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < pixels; ++i) h[i * channels + c] = x[c * pixels + i];
  }
}

template <class T>
void forward_map(const T* packed, const ChainLayer& layer, int64_t count, ChainBuffers<T>& buffers) {
  const ChainStage& map = *layer.map;
  if (map.kind == StageKind::kLinear) {
    forward_linear(map, packed + layer.forward, count, buffers);
  } else {
    for (int64_t t = 0; t < count; ++t) {
      const T* h = buffers.activations + t * buffers.width;
      T* z = buffers.spare + t * buffers.width;
      if (map.kind == StageKind::kConvolution) {
        forward_convolution(map, packed + layer.forward, h, z, buffers);
      } else {
        forward_average(map, h, z);
      }
    }
  }
  exchange(buffers.activations, buffers.spare);
}

// z: one sample behind the map of a layer.
template <class T>
void add_bias(const ChainParams& p, int64_t network, const ChainLayer& layer, T* z) {
  if (layer.map == nullptr || !has_weight(*layer.map)) return;
  const ChainStage& map = *layer.map;
  const T* bias = static_cast<const T*>(p.biases[network * p.affine + map.affine]);
  if (bias == nullptr) return;
  const int64_t units = map.out.channels, pixels = map.out.height * map.out.width;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, z += units) {
    for (int64_t o = 0; o < units; ++o) z[o] += bias[o];
  }
}

// Bias and derivatives of the stages that follow a map. What touches one sample only comes one after the other, while
// the sample lies in the nearest cache.
template <class T>
void forward_selection(const ChainParams& p, int64_t network, const ChainLayer& layer, int64_t count,
                       ChainBuffers<T>& buffers) {
  int64_t s = layer.first;
  for (int64_t t = 0; t < count; ++t) {
    T *h = buffers.activations + t * buffers.width, *factors = buffers.factors + t * buffers.kept + layer.factors;
    add_bias(p, network, layer, h);
    const int64_t units = elements(layer.out);
    for (int64_t i = 0; i < units; ++i) factors[i] = 1;
    for (s = layer.first; s < layer.end && p.stage[s].kind == StageKind::kActivation; ++s) {
      activate(p.stage[s], h, factors, elements(p.stage[s].in));
    }
  }
  bool first_pool = true;
  for (; s < layer.end; ++s) {
    const ChainStage& stage = p.stage[s];
    for (int64_t t = 0; t < count; ++t) {
      T* h = buffers.activations + t * buffers.width;
      T* factors = buffers.factors + t * buffers.kept + layer.factors;
      if (stage.kind == StageKind::kActivation) {
        activate(stage, h, factors, elements(stage.in));
      } else {
        forward_maximum(stage, first_pool, h, buffers.spare + t * buffers.width, factors,
                        buffers.sources + t * buffers.kept + layer.sources, buffers);
      }
    }
    if (stage.kind == StageKind::kMaxPool) {
      exchange(buffers.activations, buffers.spare);
      first_pool = false;
    }
  }
}

template <class T>
void forward(const ChainParams& p, int64_t network, const T* packed, const int64_t* samples, int64_t count,
             ChainBuffers<T>& buffers) {
  for (int64_t t = 0; t < count; ++t) read_sample(p, samples[t], buffers.activations + t * buffers.width);
  for (int64_t l = 0; l < buffers.layers; ++l) {
    const ChainLayer& layer = buffers.layer[l];
    if (layer.map != nullptr) forward_map(packed, layer, count, buffers);
    forward_selection(p, network, layer, count, buffers);
  }
  for (int64_t t = 0; t < count; ++t) {
    const T* y = buffers.activations + t * buffers.width;
    buffers.defined[t] = true;
    for (int64_t k = 0; k < buffers.outputs; ++k) buffers.defined[t] = buffers.defined[t] && y[k] == y[k];
  }
}

#endif

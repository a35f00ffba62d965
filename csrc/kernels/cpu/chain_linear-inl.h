// Products of a few rows with a linear stage, over the units that a sample selects.
#ifndef LIPFAST_CHAIN_LINEAR_INL_H
#define LIPFAST_CHAIN_LINEAR_INL_H

#include "chain_layers-inl.h"
#include "panel_product-inl.h"

// What layer `l` selects for sample t.
template <class T>
struct Selection {
  const T* factors;
  const int32_t* sources;  // nullptr: the identity
  int64_t count;

  Selection(const ChainLayer& layer, int64_t t, const ChainBuffers<T>& buffers)
      : factors(buffers.factors + t * buffers.kept + layer.factors),
        sources(layer.pooled ? buffers.sources + t * buffers.kept + layer.sources : nullptr),
        count(elements(layer.selected)) {}
  LIPFAST_INLINE int64_t source(int64_t element) const { return sources == nullptr ? element : sources[element]; }
};

#if LIPFAST_VECTOR_BYTES == 64
LIPFAST_INLINE uint32_t lanes_active(const float* factors, uint32_t valid) {
  const __m512 values = _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), factors);
  return _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}
LIPFAST_INLINE uint32_t lanes_active(const double* factors, uint32_t valid) {
  const __m512d zero = _mm512_setzero_pd(), low = _mm512_maskz_loadu_pd(static_cast<__mmask8>(valid), factors),
                high = _mm512_maskz_loadu_pd(static_cast<__mmask8>(valid >> 8), factors + 8);
  const uint32_t above = _mm512_cmp_pd_mask(high, zero, _CMP_NEQ_UQ);
  return _mm512_cmp_pd_mask(low, zero, _CMP_NEQ_UQ) | above << 8;
}
#endif

// Units with a derivative other than zero. Returns how many; writes whole vectors, up to round_up(units, kIndices).
// One by one this takes as long as a tenth of the products of a narrow network.
template <class T>
int64_t find_active(const T* factors, int64_t units, int32_t* active) {
  int64_t count = 0;
#if LIPFAST_VECTOR_BYTES == 64
  __m512i indices = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < units; i += kIndices) {
    const uint32_t valid = units - i < kIndices ? (1u << (units - i)) - 1 : 0xffff,
                   lanes = lanes_active(factors + i, valid);
    _mm512_storeu_si512(active + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), indices));
    count += __builtin_popcount(lanes);
    indices = _mm512_add_epi32(indices, _mm512_set1_epi32(kIndices));
  }
#else
  for (int64_t i = 0; i < units; ++i) {
    active[count] = static_cast<int32_t>(i);
    count += factors[i] != 0;
  }
#endif
  return count;
}

// Samples [first, end) of the tile together, so that a panel is read once from beyond the nearest cache.
template <class T>
void product_linear(const ChainLayer& layer, const T* packed, int64_t first, int64_t end, const T* g, T* out,
                    ChainBuffers<T>& buffers) {
  const int64_t inputs = layer.columns, units = layer.map->out.channels, size = buffers.outputs * buffers.stride;
  int64_t *counts = buffers.actives, *starts = counts + buffers.tile;
  for (int64_t t = first; t < end; ++t) {
    const Selection<T> selection(layer, t, buffers);
    counts[t] = find_active(selection.factors, units, buffers.active + t * buffers.most_units);
    starts[t] = 0;
  }
  for (int64_t j = 0; j < inputs; j += kColumns<T>) {
    const T* panel = panel_at<T>(packed, units, j);
    const bool joined = !layer.triangular && joins_last_panels<T>(inputs - j);
    const T* next = joined ? panel_at<T>(packed, units, j + kColumns<T>) : nullptr;
    for (int64_t t = first; t < end; ++t) {
      const int32_t* active = buffers.active + t * buffers.most_units;
      // Rows of a lower triangle before column j are zero there.
      while (layer.triangular && starts[t] < counts[t] && active[starts[t]] < j) ++starts[t];
      active += starts[t];
      const Terms terms{active, active, counts[t] - starts[t]};
      const T* rows = g + t * size;
      T* to = out + t * size + j;
      if (joined) {
        all_rows_times_joined_panels(rows, buffers.outputs, buffers.stride, terms, panel, next, to, buffers.stride);
      } else {
        all_rows_times_panel(rows, buffers.outputs, buffers.stride, terms, panel, panel_width<T>(inputs - j), to,
                             buffers.stride);
      }
    }
    if (joined) break;
  }
}

#endif

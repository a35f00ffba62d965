// Body of chain_jacobian_norms, once per instruction set.
#ifndef LIPFAST_CHAIN_JACOBIAN_NORMS_INL_H
#define LIPFAST_CHAIN_JACOBIAN_NORMS_INL_H

#include "chain_backward-inl.h"
#include "chain_forward-inl.h"
#include "chain_layers-inl.h"
#include "chain_triangle-inl.h"
#include "reduce-inl.h"

template <class T>
void chain_tile(const ChainParams& p, int64_t network, const void* weights, const int64_t* samples, int64_t count,
                void* workspace) {
  const T* packed = static_cast<const T*>(weights);
  ChainBuffers<T> buffers;
  buffers.place(p, static_cast<char*>(workspace));
  const int64_t outputs = buffers.outputs, inputs = buffers.inputs;
  forward(p, network, packed, samples, count, buffers);
  const T* jacobians = chain_products(p, packed, count, buffers);
  T* spectral = static_cast<T*>(p.spectral) + network * p.batch;
  T* frobenius = static_cast<T*>(p.frobenius) + network * p.batch;
  for (int64_t first = 0; first < count; first += kDoubles) {
    const int64_t lanes = smaller<int64_t>(kDoubles, count - first);
    T norms[2][kDoubles];
    reduce(jacobians + first * outputs * buffers.stride, buffers.stride, lanes, outputs, inputs, norms[0], norms[1],
           buffers.reduce);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t sample = samples[first + lane];
      spectral[sample] = buffers.defined[first + lane] ? norms[0][lane] : static_cast<T>(NAN);
      frobenius[sample] = buffers.defined[first + lane] ? norms[1][lane] : static_cast<T>(NAN);
    }
  }
}

template <class T>
ChainTiling chain_tiling(const ChainParams& p) {
  LayerReader<T> reader{p};
  int64_t triangle = 0;
  for (ChainLayer layer; reader.next(layer);) {
    if (layer.triangular) triangle = triangle_size(layer.columns) * static_cast<int64_t>(sizeof(double));
  }
  ChainBuffers<T> buffers;
  const int64_t workspace = buffers.place(p, nullptr);
  return {reader.packed, triangle, buffers.tile, buffers.shares, workspace};
}

ChainKernel chain_kernel(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return {chain_tiling<float>, pack_chain<float>, chain_tile<float>};
  return {chain_tiling<double>, pack_chain<double>, chain_tile<double>};
}

#endif

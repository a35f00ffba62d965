// Body of hermitian_residual; the contract is in hermitian_residual.h.
#pragma once

#include "factor_residual.cuh"
#include "hermitian_residual.h"

namespace lipfast::cuda {

__global__ void __launch_bounds__(kTileThreads, 5) hermitian_residual_kernel(HermitianResidualParams p, int64_t tiles) {
  LIPFAST_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<ResidualShared<Complex>*>(memory);
  const int64_t side = p.side;
  for (int64_t at = blockIdx.x; at < p.batch * tiles; at += gridDim.x) {
    const int64_t matrix = at / tiles;
    const auto* a = reinterpret_cast<const Complex*>(p.hermitian) + matrix * side * side;
    const auto entry = [&](int64_t i, int64_t j) { return a[i * side + j]; };
    const RowMajor<Complex> b{reinterpret_cast<const Complex*>(p.matrices) + matrix * side * p.length, p.length};
    const LowerTriangle<Complex> factor{reinterpret_cast<const Complex*>(p.factors) + matrix * side * side, side};
    write_residual(entry, b, factor, lower_tile(at % tiles, kResidualTile), shared, p.out + 2 * at);
  }
}

}  // namespace lipfast::cuda

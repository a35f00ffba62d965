#pragma once

#include "tap_products.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

template <int kEach>
void run_tap_tiles(const cuda::TapProductsParams& p, unsigned grid, uint64_t seed) {
  cuda_on_cpu::run({grid, cuda::kTileThreads, sizeof(cuda::TilePanels<double, kEach>), seed},
                   [&] { cuda::tap_products_kernel<kEach>(p); });
}

void run_tap_products(Input& input, Output& output) {
  cuda::TapProductsParams p{};
  p.symbols = input.number();
  p.rows = input.number();
  p.cols = input.number();
  for (int64_t& size : p.axes.sizes) size = input.number();
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  const auto taps = input.array<double>(p.symbols * p.axes.count() * p.rows * p.cols);
  std::vector<double> out(p.symbols * p.axes.differences() * p.rows * p.rows);
  p.taps = taps.data();
  p.out = out.data();
  p.rows <= cuda::kSmallSide ? run_tap_tiles<2>(p, grid, seed) : run_tap_tiles<4>(p, grid, seed);
  output.array(out);
}

const RegisterCase registered_tap_products("tap_products", run_tap_products);

}  // namespace
}  // namespace lipfast

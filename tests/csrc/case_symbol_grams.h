#pragma once

#include "symbol_grams.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

void run_symbol_grams(Input& input, Output& output) {
  cuda::SymbolGramsParams p{};
  const int64_t symbols = input.number();
  p.count = input.number();
  p.rows = input.number();
  for (int64_t& size : p.axes.sizes) size = input.number();
  for (int64_t& period : p.periods) period = input.number();
  const auto grid = static_cast<unsigned>(input.number());
  const auto seed = static_cast<uint64_t>(input.number());
  const auto products = input.array<double>(symbols * p.axes.differences() * p.rows * p.rows);
  const auto chosen = input.array<int64_t>(p.count), centres = input.array<int64_t>(3 * p.count);
  const auto shifts = input.array<double>(p.count);
  std::vector<cuda::Complex> out(p.count * p.rows * p.rows);
  p.products = products.data();
  p.symbols = chosen.data();
  p.centres = centres.data();
  p.shifts = shifts.data();
  p.out = reinterpret_cast<double*>(out.data());
  const int64_t tiles = cuda::lower_tiles(p.rows, cuda::kSymbolTile);
  cuda_on_cpu::run({grid, cuda::kSymbolThreads, sizeof(cuda::SymbolGramsShared), seed},
                   [&] { cuda::symbol_grams_kernel(p, tiles); });
  output.array(out);
}

const RegisterCase registered_symbol_grams("symbol_grams", run_symbol_grams);

}  // namespace
}  // namespace lipfast

#pragma once

#include "shifted_grams.cuh"

#include "harness_cases.h"

namespace lipfast {
namespace {

// Matrices (batch, side, length) of a type, stored with `rows` first or transposed.
template <class T>
cuda::WideMatrices read_matrices(Input& input, std::vector<T>& data, const int64_t* shape, bool transposed) {
  data = input.array<T>(shape[0] * shape[1] * shape[2]);
  const Dtype dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  return {data.data(),
          dtype,
          shape[0],
          shape[1],
          shape[2],
          shape[1] * shape[2],
          transposed ? 1 : shape[2],
          transposed ? shape[1] : 1};
}

struct CertificateInput {
  std::vector<int64_t> shape;
  unsigned grid;
  uint64_t seed;
  bool single;
  std::vector<float> singles;
  std::vector<double> doubles;
  cuda::WideMatrices matrices;

  explicit CertificateInput(Input& input) {
    shape = input.array<int64_t>(3);
    grid = static_cast<unsigned>(input.number());
    seed = static_cast<uint64_t>(input.number());
    single = input.number() != 0;
    const bool transposed = input.number() != 0;
    matrices = single ? read_matrices(input, singles, shape.data(), transposed)
                      : read_matrices(input, doubles, shape.data(), transposed);
  }
};

void run_shifted_grams(Input& input, Output& output) {
  const CertificateInput given(input);
  const int64_t batch = given.shape[0], side = given.shape[1], tiles = cuda::lower_tiles(side, cuda::kGramTile);
  const std::vector<double> lower = input.array<double>(batch), excess = input.array<double>(1);
  std::vector<double> grams(batch * side * side), scales(batch), shifts(batch);
  const cuda::ShiftedGramParams p{given.matrices, lower.data(), excess[0], grams.data(), scales.data(), shifts.data()};
  cuda_on_cpu::run(
      {given.grid, cuda::kTileThreads, sizeof(cuda::TilePanels<double, cuda::kGramEach>), given.seed}, [&] {
        given.single ? cuda::shifted_grams_kernel<float>(p, tiles) : cuda::shifted_grams_kernel<double>(p, tiles);
      });
  output.array(grams);
  output.array(scales);
  output.array(shifts);
}

const RegisterCase registered_shifted_grams("shifted_grams", run_shifted_grams);

}  // namespace
}  // namespace lipfast

// clang-format off
// conv_norms: bracket of S = sup over theta of sigma_max(What(theta)), What(theta) = sum_k W_k e^{i k.theta}, the
// supremum of a convolution's spectral norm over all input sizes.
//
// Types        float32 or float64 taps; Gram matrices, their factors and all vectors in float64.
// Lower        || What(theta)^* x || / || x || at the best frequency found, less its own rounding: never above S.
// Upper        tau such that every cell of the half torus was proved not to hold a maximum above tau, by its trace,
//              its Frobenius norm or a Cholesky factorisation at its centre: never below S, whatever was searched.
//              Without memory for the Gram matrices: Hoelder's bound of sum_k |W_k|.
// Proved by    conv_cells (the cells cover), conv_grams (what is known of a Gram matrix), conv_cover (no cell is lost,
//              tests of cells), conv_norms.cpp (what is reported), and the kernels in conv_norms-inl.h.
// Chosen by    conv_ascent and conv_search: nothing that they do makes a bound false.
// Derivations  docs/bounds.md.
// Errors       no exceptions but std::bad_alloc; a NaN or infinite tap is reported through ConvResult::finite.
// Threads      cells are tested in chunks of a fixed size: results do not depend on the number of threads.
// clang-format on
#pragma once

#include "taps.h"

namespace lipfast {

enum class ConvUpperMethod : int32_t {
  kCholesky = 0,
  kHolder = 1,
};

struct ConvProblem {
  const void* taps;  // of all groups, one after another; rows <= cols
  Dtype dtype;
  int64_t groups;
  TapShape shape;            // of one group; taps per axis: at least 2 on the lattice's axes, 1 beyond them
  FrequencyLattice lattice;  // 0 to 3 axes
  bool on_grid;              // the maximum over the lattice's frequencies, a small grid, instead of the supremum
  double rtol;
  int64_t max_cells;  // work budget: cells whose matrix is factored; 0: no upper bound but inf, and from a start the
                      // lower one at its frequency
  int64_t memory;     // bytes that the Gram matrices may take
  uint64_t seed;
  const double* start;  // nullptr, or: group, frequency per axis (3, cycles), vector (2 rows)
  const Parallel* parallel;
};

// Zero but for left and right when a kernel begins.
struct ConvResult {
  double lower, upper;
  double frequency[3];  // where the lower value is attained, cycles per tap
  int64_t group;
  int64_t cells;  // factored
  ConvUpperMethod method;
  bool finite;
  double* left;   // 2 rows: real parts, then imaginary parts
  double* right;  // 2 cols
};

void conv_norms(const ConvProblem& problem, ConvResult& result);

}  // namespace lipfast

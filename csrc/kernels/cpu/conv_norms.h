// conv_norms: bracket of S = sup over theta of sigma_max(What(theta)), What(theta) = sum_k W_k e^{i k.theta}, the
// supremum of a convolution's spectral norm over all input sizes.
//
// Types        float32 or float64 taps; Gram matrices, their factors and all vectors in float64.
// Lower        || What(theta)^* x || / || x || at the best frequency found, less its own rounding: never above S.
// Upper        tau such that every cell of the half torus was proved not to hold a maximum above tau, by its trace,
//              its Frobenius norm or a Cholesky factorisation at its centre: never below S, whatever was searched.
//              Without memory for the Gram matrices: Hoelder's bound of sum_k |W_k|.
// Derivations  docs/bounds.md.
// Errors       no exceptions but std::bad_alloc; a NaN or infinite tap is reported through ConvResult::finite.
// Threads      cells are tested in chunks of a fixed size: results do not depend on the number of threads.
#pragma once

#include "../params.h"

namespace lipfast {

enum class ConvUpperMethod : int32_t {
  kCholesky = 0,
  kHolder = 1,
};

// Taps (groups, sizes[0], sizes[1], sizes[2], rows, cols), dense and row-major, rows <= cols.
struct ConvProblem {
  const void* taps;
  Dtype dtype;
  int64_t groups, rows, cols;
  int64_t axes;      // 0 to 3; sizes beyond them are 1, sizes before are at least 2
  int64_t sizes[3];  // taps per axis
  bool on_grid;      // the maximum over a finite grid of frequencies instead of the supremum
  int64_t grid[3];   // its points per axis
  double rtol;
  int64_t max_cells;  // work budget: cells whose matrix is factored; 0: no upper bound but inf, and from a start the
                      // lower one at its frequency
  int64_t memory;     // bytes that the Gram matrices may take
  uint64_t seed;
  const double* start;  // nullptr, or: group, frequency per axis (3, cycles), vector (2 rows)
  const Parallel* parallel;
};

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

// Frequencies are integers over this.
inline int64_t frequency_denominator(const ConvProblem& problem, int64_t axis) {
  return problem.on_grid ? problem.grid[axis] : int64_t{1} << 40;
}

// The pieces of a Gram matrix of one group: see complex_gram-inl.h.
struct GramTable {
  const double* even;
  const double* odd;
  int64_t rows;
  int64_t offsets;
};

// One test for each of `count` <= width frequencies: is A = sign (t I - G) positive definite in floating point?
// For sign > 0, ||G||_F^2 <= limit proves what is asked without factoring.
struct CellTests {
  const double* phases;  // cosines and sines of all offsets, one frequency after another
  int64_t count;
  const double* shifts;
  const double* limits;
  double sign;
};

// The kernels of one instruction set; conv_norms.cpp runs the search.
struct ConvKernels {
  bool (*examine)(const ConvProblem&, int* exponent, double* largest);
  void (*magnitudes)(const ConvProblem&, int exponent, int64_t group, double* out, double* work);
  void (*pack)(const ConvProblem&, int exponent, int64_t group, double* panels);
  void (*autocorrelate)(const ConvProblem&, const int64_t* offset, double* panels, double* square, double* even,
                        double* odd, double* trace);
  void (*phases)(const ConvProblem&, const int64_t* offsets, int64_t count, const int64_t* p, double* out);
  double (*dot)(const double*, const double*, int64_t);
  int64_t (*test_width)(int64_t rows);
  int64_t (*test_size)(int64_t rows, int64_t offsets);
  uint32_t (*test)(const GramTable&, const CellTests&, double* work);
  double (*top)(const GramTable&, const double* phases, int32_t passes, double tolerance, double* x, double* work);
  void (*coefficients)(const GramTable&, const double* x, double* out, double* work);
  int64_t (*top_size)(int64_t rows);
  double (*lower)(const ConvProblem&, int exponent, int64_t group, const int64_t* p, const double* x, double* y,
                  double* work);
  double (*lower_without_gram)(const ConvProblem&, int exponent, int64_t group, const int64_t* p, double* x, double* y,
                               double* work);
  int64_t (*lower_size)(const ConvProblem&);
  int64_t (*panels_size)(const ConvProblem&);
  int64_t (*square_size)(int64_t rows);
  int64_t (*packed_size)(int64_t rows);
};

const ConvKernels& conv_kernels();

// Doubles of a vector x in the kernels: real parts, then imaginary ones, each filled with zeros to a multiple of 8.
inline int64_t conv_vector_half(int64_t rows) { return (rows + 7) / 8 * 8; }

void conv_norms(const ConvProblem& problem, ConvResult& result);

}  // namespace lipfast

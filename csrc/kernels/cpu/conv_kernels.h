// The kernels of conv_norms of one instruction set, as its search calls them.
#pragma once

#include "conv_norms.h"

namespace lipfast {

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

struct ConvKernels {
  bool (*examine)(const ConvProblem&, int* exponent, double* largest);
  void (*magnitudes)(const ConvProblem&, int exponent, int64_t group, double* out, double* work);
  void (*pack)(const ConvProblem&, int exponent, int64_t group, double* panels);
  void (*autocorrelate)(const TapShape&, const int64_t* offset, double* panels, double* square, double* even,
                        double* odd, double* trace);
  void (*phases)(const FrequencyLattice&, const int64_t* offsets, int64_t count, const int64_t* p, double* out);
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
  int64_t (*panels_size)(const TapShape&);
  int64_t (*square_size)(int64_t rows);
  int64_t (*packed_size)(int64_t rows);
};

// For taps of this type.
const ConvKernels& conv_kernels(Dtype dtype);

// Doubles of a vector x in the kernels: real parts, then imaginary ones, each filled with zeros to a multiple of 8.
inline int64_t conv_vector_half(int64_t rows) { return (rows + 7) / 8 * 8; }

}  // namespace lipfast

// Where a convolution's symbol is large: an ascent over frequencies and vectors. Nothing here is part of a proof.
#pragma once

#include <vector>

#include "conv_grams.h"

namespace lipfast {

struct SymbolMaximum {
  double value = -1;  // of the Gram matrix's largest eigenvalue: an estimate from below
  int64_t group = 0;
  Frequency p{0, 0, 0};
  std::vector<double> x;
};

// A seeded unit vector.
std::vector<double> conv_start_vector(const ConvProblem& problem);

// Where the caller's kernel nearby has its maximum, with a little noise that keeps every direction within reach; false
// where the caller says nothing.
bool find_start(const ConvProblem& problem, SymbolMaximum& known);

class ConvAscent {
 public:
  ConvAscent(const ConvProblem& problem, const ConvGrams& grams);

  // Alternates between the top vector at a frequency and the best frequency for the vector; never descends.
  SymbolMaximum ascend(SymbolMaximum from);
  // The cells of level 0 with the largest traces, ascended from the best of them.
  std::vector<SymbolMaximum> survey(const std::vector<Frequency>& roots);

 private:
  void find_top(SymbolMaximum& at, int32_t passes);
  Frequency polynomial_maximum(const std::vector<double>& coefficients, Frequency from, double* value) const;
  double polynomial(const std::vector<double>& coefficients, const Frequency& p, double* gradient,
                    double (*hessian)[3]) const;
  Frequency moved(Frequency from, const double* step) const;

  const ConvProblem& problem_;
  const ConvGrams& grams_;
  const ConvKernels& kernels_;
  WorkspacePool tops_;
};

}  // namespace lipfast

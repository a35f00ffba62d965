// clang-format off
// chain_interval_jacobian: norms 1 and inf of all Jacobians that slopes within ranges make of a chain of affine maps.
//
// Types        float32 or float64 for weights, read as they are and converted exactly; all else float64.
// Error        never below: every Jacobian D_L W_L ... D_1 W_1 D_0, with W_i within `error` of the stored weight and the
//              diagonal D_i between `low` and `high`, has at most the norm that is said, in real arithmetic. Entries are
//              balls (middle, radius), two products per map; docs/bounds.md has the terms for rounding and their proof.
// Conventions  W is (out, in). Without `low` a map's results go on as they are.
// Errors       none: where a number overflows or is NaN, the answer is inf.
// Threads      a block of up to kIntervalRows rows of the Jacobian is one thread's. Round to nearest and denormals are
//              assumed: see StandardArithmetic.
// clang-format on
#pragma once

#include "../params.h"

namespace lipfast {

constexpr int64_t kIntervalRows = 8;

struct IntervalMap {
  const void* weight;
  Dtype dtype;
  int64_t rows, columns;
  const double* error;       // (rows, columns), nullptr: the weight is exact
  const double *low, *high;  // slopes behind the map (rows), or nullptr
};

struct IntervalChain {
  const IntervalMap* maps;  // in the order of evaluation
  int64_t count;
  const double *low, *high;  // slopes before the first map, or nullptr
  int64_t widest;            // largest number of rows or columns of a map
};

struct ChainIntervalJacobianKernel {
  // Bytes that `rows` needs.
  int64_t (*workspace)(const IntervalChain&);
  // Of the Jacobian's rows [first, first + count), count <= kIntervalRows: the largest sum of magnitudes of one
  // (sums[0]), or, by columns, the sums of magnitudes of each column, as computed: `interval_total` bounds their sums.
  void (*rows)(const IntervalChain&, int64_t first, int64_t count, bool by_columns, double* sums, double* workspace);
  // The largest sum of magnitudes in a row or a column of a weight, as computed; NaN where an entry is none.
  double (*largest_sum)(const IntervalMap&, bool by_columns, double* workspace);
};

ChainIntervalJacobianKernel chain_interval_jacobian_kernel();

}  // namespace lipfast

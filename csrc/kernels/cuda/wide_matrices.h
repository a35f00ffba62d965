// Many matrices of one shape as they lie in memory.
#pragma once

#include "../params.h"

namespace lipfast::cuda {

// (batch, side, length) of any strides, in entries.
struct WideMatrices {
  const void* data;
  Dtype dtype;
  int64_t batch, side, length;
  int64_t step, row_step, column_step;
};

}  // namespace lipfast::cuda

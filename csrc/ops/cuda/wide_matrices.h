// Matrices of any strides as the certificates' kernels take them.
#pragma once

#include "../../kernels/cuda/wide_matrices.h"
#include "../checks.h"

namespace lipfast {

inline cuda::WideMatrices wide_matrices(const Tensor& matrices) {
  return {matrices.data_ptr(), dtype_of(matrices), matrices.size(0),   matrices.size(1),
          matrices.size(2),    matrices.stride(0), matrices.stride(1), matrices.stride(2)};
}

}  // namespace lipfast

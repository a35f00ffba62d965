#include "conv_norms.h"

#include "capability.h"

#define LIPFAST_BODY "conv_norms-inl.h"
#include "isa.h"

namespace lipfast {

const ConvKernels& conv_kernels() {
  static constexpr const ConvKernels* (*table[kCapabilities])() = LIPFAST_TABLE(conv_table);
  return *dispatch(table)();
}

}  // namespace lipfast

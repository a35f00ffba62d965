#include "../../kernels/cuda/shifted_grams.h"

#include <tuple>

#include "device.h"
#include "wide_matrices.h"

namespace lipfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> shifted_grams_cuda(Tensor matrices, Tensor lower, double excess) {
  check_shifted_grams(matrices, lower);
  check_device(lower, matrices, "shifted_grams: lower");
  const DeviceGuard guard(matrices.get_device_index());
  const int64_t batch = matrices.size(0), side = matrices.size(1);
  Tensor grams = torch::stable::new_empty(lower, {batch, side, side});
  Tensor scales = torch::stable::new_empty(lower, {batch}), shifts = torch::stable::new_empty(lower, {batch});
  const cuda::ShiftedGramParams params{
      wide_matrices(matrices),       values<double>(lower),          excess,
      mutable_values<double>(grams), mutable_values<double>(scales), mutable_values<double>(shifts)};
  cuda::launch_shifted_grams_cuda(params, current_stream(matrices));
  return {grams, scales, shifts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("shifted_grams", TORCH_BOX(&shifted_grams_cuda)); }

}  // namespace lipfast

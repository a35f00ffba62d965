#include "../../kernels/cuda/spectral_norms.h"

#include <algorithm>
#include <tuple>

#include "device.h"

namespace lipfast {
namespace {

constexpr int64_t kMostItems = int64_t{1} << 30;

// Where the results of the matrices behind a plan's begin.
cuda::SpectralOutputs after(const cuda::SpectralOutputs& out, const cuda::SpectralPlan& plan) {
  const auto count = static_cast<int64_t>(plan.entries.size());
  return {out.lower + count,        out.upper + count,      out.passes + count,
          out.upper_method + count, out.right + plan.right, out.left + plan.left};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Lower bounds, and with `certify` Hoelder's upper bounds; lipfast.ops.gram_certificate makes those tight. Nothing
// waits for the device, so a CUDA graph can hold it. Matrices come in as many batches as their workspace needs to stay
// within `memory`, one matrix at least; how they are cut changes no result.
Outputs spectral_norms_cuda(std::vector<Tensor> matrices, std::vector<Tensor> start, bool certify, double rtol,
                            int64_t max_passes, bool power, int64_t seed, int64_t memory) {
  check_spectral_norms(matrices, start);
  const Tensor& like = matrices[0];
  const DeviceGuard guard(like.get_device_index());
  const auto count = static_cast<int64_t>(matrices.size());
  std::vector<cuda::SpectralPlan> plans(1);
  int64_t rows = 0, cols = 0, bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& matrix = matrices[i];
    check_device(matrix, like, "spectral_norms: matrix " + std::to_string(i));
    const bool given = !start.empty() && start[i].numel() > 0;
    if (given) check_device(start[i], like, "spectral_norms: start vector " + std::to_string(i));
    // Before it grows beyond the memory, or beyond what items are numbered with.
    const cuda::SpectralPlan& last = plans.back();
    const int64_t needed = last.bytes() + last.bytes_of(matrix.size(0), matrix.size(1), dtype_of(matrix));
    if (!last.entries.empty() && (needed > memory || last.items > kMostItems)) plans.emplace_back();
    plans.back().add(matrix.data_ptr(), dtype_of(matrix), matrix.size(0), matrix.size(1),
                     given ? values<double>(start[i]) : nullptr);
    bytes = std::max(bytes, plans.back().bytes());
    rows += matrix.size(0);
    cols += matrix.size(1);
  }
  const auto vector = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(like, {size}, type); };
  Tensor lower = vector(count, ScalarType::Double), upper = vector(count, ScalarType::Double);
  Tensor passes = vector(count, ScalarType::Long), method = vector(count, ScalarType::Long);
  Tensor right = vector(cols, ScalarType::Double), left = vector(rows, ScalarType::Double);
  Tensor workspace = bytes_like(like, bytes);
  cuda::SpectralOutputs out{mutable_values<double>(lower),   mutable_values<double>(upper),
                            mutable_values<int64_t>(passes), mutable_values<int64_t>(method),
                            mutable_values<double>(right),   mutable_values<double>(left)};
  for (const cuda::SpectralPlan& plan : plans) {
    cuda::SpectralLaunch launch = plan.launch(mutable_values<char>(workspace));
    // Half of rtol is the certificate's; the value is a square, whose relative error is twice that of the norm.
    launch.options = {static_cast<uint64_t>(seed), certify ? 0.25 * rtol : 2 * rtol, static_cast<int32_t>(max_passes),
                      power, certify};
    launch.out = out;
    cuda::launch_spectral_norms_cuda(plan, launch, current_stream(like));
    out = after(out, plan);
  }
  return {lower, upper, passes, method, right, left};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("spectral_norms", TORCH_BOX(&spectral_norms_cuda)); }

}  // namespace lipfast

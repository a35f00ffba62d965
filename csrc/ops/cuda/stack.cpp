#include "../../kernels/cuda/stack.h"

#include "device.h"

namespace lipfast {
namespace {

Tensor stack_cuda(std::vector<Tensor> tensors) {
  check_stack(tensors);
  const Tensor& first = tensors[0];
  for (size_t i = 0; i < tensors.size(); ++i) check_device(tensors[i], first, "stack: tensor " + std::to_string(i));
  const DeviceGuard guard(first.get_device_index());
  std::vector<int64_t> shape{static_cast<int64_t>(tensors.size())};
  for (int64_t axis = 0; axis < first.dim(); ++axis) shape.push_back(first.size(axis));
  Tensor result = torch::stable::new_empty(first, shape);
  const std::vector<const void*> all = addresses(tensors);
  cuda::StackLaunch stack{};
  stack.bytes = first.numel() * static_cast<int64_t>(first.element_size());
  if (stack.bytes == 0) return result;
  const auto count = static_cast<int64_t>(all.size());
  for (int64_t at = 0; at < count; at += stack.count) {
    cuda::set_stacked(all.data() + at, count - at, stack);
    stack.out = static_cast<char*>(result.data_ptr()) + at * stack.bytes;
    cuda::launch_stack_cuda(stack, current_stream(first));
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("stack", TORCH_BOX(&stack_cuda)); }

}  // namespace lipfast

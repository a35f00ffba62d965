// stack: many tensors of one shape as one. Schema and argument checks.
#include "checks.h"

namespace lipfast {

void check_stack(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "stack: there are no tensors");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = "stack: tensor " + std::to_string(i);
    const Tensor &tensor = tensors[i], &first = tensors[0];
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type() && text(tensor) == text(first), name,
                    ": expected the type and shape of the first");
  }
}

// (tensors, *shape).
LIPFAST_SCHEMA("stack(Tensor[] tensors) -> Tensor")

}  // namespace lipfast

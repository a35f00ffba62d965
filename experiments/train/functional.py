"""A module whose parameters are tensors of someone else, connected for autograd."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call


class ConnectedModel(nn.Module):
    """Evaluates an architecture with given tensors in place of its parameters, in eval mode.

    Args:
        architecture: may be on the meta device.
        tensors: by the names of the parameters and buffers.
    """

    def __init__(self, architecture: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        # In a tuple, so that the architecture's own parameters are not this module's.
        self._held = (architecture.eval(), dict(tensors))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the architecture."""
        architecture, tensors = self._held
        return functional_call(architecture, tensors, (x,))  # type: ignore[no-any-return]

"""How far training moves the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lipfast.errors import ArgumentError


def path_length(states: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """``L_t = sum_{s <= t} ||theta_s - theta_{s-1}||_2`` along the checkpoints of one run.

    Khromov and Singh (appendix 3.18): bounds grow with it, since
    ``C(theta_T) <= (2/r) C_theta L_T + C(theta_0)`` (appendix 4.1), with r the diameter of the data
    and C_theta the Lipschitz constant in the parameters. Between checkpoints the true path is at
    least as long; the training engine records it update by update.

    Args:
        states: state dicts in the order of training, with the same names and shapes.

    Returns:
        L_t for every checkpoint; the first is 0.

    Raises:
        ArgumentError: names or shapes change along the run.

    Example:
        >>> path_length([{"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}])
        [0.0, 5.0]
    """
    lengths: list[float] = []
    before: Mapping[str, Tensor] | None = None
    for state in states:
        if before is None:
            lengths.append(0.0)
        else:
            shapes = {name: tensor.shape for name, tensor in state.items()}
            if shapes != {name: tensor.shape for name, tensor in before.items()}:
                raise ArgumentError("the checkpoints of a run must have the same parameters")
            moved = sum(
                float((tensor.double() - before[name].double()).square().sum())
                for name, tensor in state.items()
                if torch.is_floating_point(tensor)
            )
            lengths.append(lengths[-1] + moved**0.5)
        before = state
    return lengths

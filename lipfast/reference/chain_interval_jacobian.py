"""Interval Jacobians of chains in float64, as they are computed without a proof."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def chain_interval_jacobian(
    weights: Sequence[Tensor],
    lower: Sequence[Tensor | None],
    upper: Sequence[Tensor | None],
    norm: float,
    errors: Sequence[Tensor | None] | None = None,
) -> float:
    r"""Norm of the largest magnitudes in $D_L W_L \cdots D_1 W_1 D_0$ over all slopes.

    Rounding is not bounded: this is what the op exceeds by little.

    Args:
        weights: of one network, in the order of evaluation.
        lower: least slopes before the first map and behind each, (units,), or None.
        upper: largest slopes.
        norm: 1 or inf.
        errors: of the weights.
    """
    low = high = torch.eye(len(weights[-1]), dtype=torch.float64)
    for index in range(len(weights), -1, -1):
        least, most = lower[index], upper[index]
        if least is not None and most is not None:
            ends = torch.stack([end * slope for end in (low, high) for slope in (least, most)])
            low, high = ends.amin(0), ends.amax(0)
        if index:
            weight = weights[index - 1].double()
            error = None if errors is None else errors[index - 1]
            room = torch.zeros_like(weight) if error is None else error
            middle, radius = (low + high) / 2, (high - low) / 2
            centre = middle @ weight
            reach = radius @ weight.abs() + (middle.abs() + radius) @ room
            low, high = centre - reach, centre + reach
    sizes = torch.maximum(low.abs(), high.abs())
    return float(sizes.sum(1 if math.isinf(norm) else 0).max())

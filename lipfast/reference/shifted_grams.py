"""t I - B B^T of scaled matrices, by forming both."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shifted_grams(
    matrices: Tensor, lower: Tensor, *, excess: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""$t I - B B^T$, (n, s, s), with $B = 2^{-e} W$; $2^{-e}$ and t, (n,): float64.

    Args:
        matrices: W, (n, s, l).
        lower: near their norms, (n,): e is its exponent, and t its scaled square times 1 + excess.
        excess: see there.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> [value.item() for value in shifted_grams(one, torch.tensor([1.0]), excess=1.0)]
        [0.25, 0.5, 0.5]
    """
    exponents = [min(max(math.frexp(value)[1], -1000), 1022) for value in lower.tolist()]
    scales = torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float64)
    shifts = ((lower.double() * scales).square() * (1 + excess)).clamp_min(2.0**-150)
    b = matrices.double() * scales[:, None, None]
    identity = torch.eye(b.shape[1], dtype=torch.float64)
    return shifts[:, None, None] * identity - b @ b.mT, scales, shifts

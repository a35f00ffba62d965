"""Upper bounds of norms from any factors of t I - B B^T, in float64 without roundings' bounds."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_bounds(
    matrices: Tensor, factors: Tensor, failures: Tensor, scales: Tensor, shifts: Tensor
) -> Tensor:
    r"""$2^e \sqrt{t + \|t I - B B^T - L L^T\|_F}$, (n,), with $B = 2^{-e} W$.

    Args:
        matrices: W, (n, s, l).
        factors: L, (n, s, s); the lower triangles count.
        failures: not 0 where there is no factor: infinite.
        scales: $2^{-e}$.
        shifts: t.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> cholesky_bounds(one, one, torch.zeros(1), one[0, 0], 2 * one[0, 0])
        tensor([1.4142], dtype=torch.float64)
    """
    b, factor = matrices.double() * scales[:, None, None], torch.tril(factors.double())
    identity = torch.eye(b.shape[1], dtype=torch.float64)
    residual = shifts.double()[:, None, None] * identity - b @ b.mT - factor @ factor.mT
    bounds = (shifts + residual.square().sum((1, 2)).sqrt()).sqrt() / scales
    return torch.where(failures == 0, bounds, torch.inf)

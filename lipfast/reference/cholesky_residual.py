"""How far t I - B B^T is from L L^T, by forming both."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_residual(matrices: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    r"""$\|t_i I - B_i B_i^T - L_i L_i^T\|_F^2$ and $\|B_i\|_F^2 + \|L_i\|_F^2$: (n, 2), float64.

    Args:
        matrices: B, (n, s, l).
        factors: L, (n, s, s); the lower triangle counts.
        shifts: t, (n,).

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> cholesky_residual(one, 2 * one, torch.tensor([5.0]))
        tensor([[0., 5.]], dtype=torch.float64)
    """
    b, factor = matrices.double(), torch.tril(factors.double())
    identity = torch.eye(b.shape[1], dtype=torch.float64)
    residual = shifts.double()[:, None, None] * identity - b @ b.mT - factor @ factor.mT
    sizes = b.square().sum((1, 2)) + factor.square().sum((1, 2))
    return torch.stack([residual.square().sum((1, 2)), sizes], 1)

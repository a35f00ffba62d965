"""Spectral and Frobenius norms of a batch of Jacobians, by SVD."""

from __future__ import annotations

import torch
from torch import Tensor


def jacobian_reduction(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\sigma_1(J_b)$ and $\|J_b\|_F$ of (B, K, D) Jacobians, in float64.

    Example:
        >>> jacobian_reduction(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        (tensor([4.], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """
    values = torch.linalg.svdvals(jacobian.double())
    top = values[:, :1].clamp_min(torch.finfo(torch.float64).tiny)  # squares must not overflow
    return values[:, 0], (values / top).square().sum(dim=1).sqrt() * top[:, 0]


def operator_norms(jacobian: Tensor, norm: float) -> Tensor:
    r"""$\|J_b\|_p$ of (B, K, D) Jacobians for p = 1, 2, inf, in float64.

    Example:
        >>> operator_norms(torch.tensor([[[3.0, -1.0], [0.0, 4.0]]]), 1)
        tensor([5.], dtype=torch.float64)
    """
    norms: Tensor = torch.linalg.matrix_norm(jacobian.double(), norm)
    return norms

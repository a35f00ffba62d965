"""How far t I - B B^T is from L L^T: what turns a factorisation by any library into a proof."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, check_same_device


def cholesky_residual(matrices: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    r"""Squared sizes of $R_i = t_i I - B_i B_i^T - L_i L_i^T$ and of $(B_i, L_i)$, in float64.

    $\|R_i\|_F^2$ and $\|B_i\|_F^2 + \|L_i\|_F^2$. Every entry of R is a plain sum of products and
    t, in any order and in IEEE float64: its error is at most $\gamma_{s+l+1}$ times the sum of
    magnitudes, whatever computed L. On CUDA this is lipfast's own kernel, because libraries may
    emulate float64 there.

    Args:
        matrices: B, (n, s, l), float64.
        factors: L, (n, s, s), float64; only the lower triangles are read.
        shifts: t, (n,), float64.

    Returns:
        (n, 2), float64, not rounded in any direction.

    Raises:
        ArgumentError: wrong types, dtypes, shapes or devices.

    Example:
        >>> import torch
        >>> from lipfast.ops.cholesky_residual import cholesky_residual
        >>> b = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
        >>> factor = torch.tensor([[[3.0]]], dtype=torch.float64)
        >>> cholesky_residual(b, factor, torch.tensor([15.0], dtype=torch.float64))
        tensor([[ 1., 14.]], dtype=torch.float64)
    """
    named = (("matrices", matrices, 3), ("factors", factors, 3), ("shifts", shifts, 1))
    for name, tensor, dimensions in named:
        if check_floating(tensor, name, dimensions).dtype != torch.float64:
            raise ArgumentError(f"{name}: expected float64, got {tensor.dtype}")
        check_same_device(tensor, matrices, name)
    count, side, length = matrices.shape
    if side == 0 or length == 0:
        raise ArgumentError(f"matrices: shape {tuple(matrices.shape)} holds empty matrices")
    if factors.shape != (count, side, side) or shifts.shape != (count,):
        raise ArgumentError(
            f"expected factors ({count}, {side}, {side}) and shifts ({count},), got "
            f"{tuple(factors.shape)} and {tuple(shifts.shape)}"
        )
    arguments = [tensor.detach().contiguous() for tensor in (matrices, factors, shifts)]
    partial: Tensor = torch.ops.lipfast.cholesky_residual(*arguments)
    return partial.sum(1)


@torch.library.register_fake("lipfast::cholesky_residual")
def _cholesky_residual_fake(matrices: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    tiles = 1
    if matrices.device.type != "cpu":
        edge = (matrices.shape[1] + 31) // 32
        tiles = edge * (edge + 1) // 2
    return matrices.new_empty((matrices.shape[0], tiles, 2))


@torch.library.impl("lipfast::cholesky_residual", "CPU")
def _cholesky_residual_cpu(matrices: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    """One tile per matrix; the CPU's own certificate needs no residual, so this is for checks."""
    factors = factors.tril()
    products = torch.baddbmm(matrices @ matrices.mT, factors, factors.mT)
    sizes = products.diagonal(dim1=1, dim2=2).sum(1)
    residual = torch.diag_embed(shifts[:, None].expand(-1, matrices.shape[1])) - products
    return torch.stack([residual.square().sum((1, 2)), sizes], 1)[:, None]

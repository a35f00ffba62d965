"""Upper bounds of norms from Cholesky factors of any library, each checked by its residual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipfast.ops._arguments import check_terms
from lipfast.ops.scaling import multiplied_up
from lipfast.rounding import WIDE, wide_gamma


def cholesky_bounds(
    matrices: Tensor, factors: Tensor, failures: Tensor, scales: Tensor, shifts: Tensor
) -> Tensor:
    r"""Upper bounds of $\|W_i\|_2$ from factors $L_i$ of $t_i I - B_i B_i^T$, $B_i = 2^{-e_i} W_i$.

    $2^e \sqrt{t + \|R\|_F + \rho}$, R = t I - B B^T - L L^T, rounded up; $\rho$ covers every
    rounding of R (`docs/bounds.md`). True for **any** L. On CUDA two launches of lipfast's own
    kernels, because libraries may emulate float64 there.

    Args:
        matrices: W, (n, s, l), float32 or float64, of any strides.
        factors: L, (n, s, s), float64; only the lower triangles are read.
        failures: (n,), int32: not 0 where a factorisation failed.
        scales: $2^{-e}$, (n,), float64: powers of two, from 2^-1022 to 2^1000.
        shifts: t, (n,), float64, at least 2^-150.

    Returns:
        (n,), float64: never below the norm; infinite where the factorisation failed, or a number is
        NaN.

    Raises:
        ArgumentError: s + l + 1 is 2^30 or more.

    Example:
        >>> import torch
        >>> one, none = torch.ones(1).double(), torch.zeros(1, dtype=torch.int32)
        >>> matrices, factors = torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 1, 1).double()
        >>> cholesky_bounds(matrices, factors, none, one, 26 * one)
        tensor([5.0990], dtype=torch.float64)
    """
    terms = matrices.shape[1] + matrices.shape[2] + 1
    check_terms(terms, "matrices")
    # Sums of k < 2^30 numbers are off by less than 2^-22, relatively, which WIDE covers.
    rounding = wide_gamma(terms) * WIDE
    found: Tensor = torch.ops.lipfast.cholesky_bounds(
        matrices, factors.contiguous(), failures, scales, shifts, rounding, WIDE * WIDE
    )
    return found


@torch.library.register_fake("lipfast::cholesky_bounds")
def _cholesky_bounds_fake(*tensors: Any) -> Tensor:
    return torch.empty_like(tensors[4])


@torch.library.impl("lipfast::cholesky_bounds", "CPU")
def _cholesky_bounds_cpu(matrices: Tensor, factors: Tensor, failures: Tensor, *rest: Any) -> Tensor:
    """The CPU's own certificate needs no residual, so this is for checks."""
    scales, shifts, rounding, room = rest
    b, factors = matrices.double() * scales[:, None, None], factors.tril()
    products = torch.baddbmm(b @ b.mT, factors, factors.mT)
    sizes = products.diagonal(dim1=1, dim2=2).sum(1)
    residual = torch.diag_embed(shifts[:, None].expand(-1, b.shape[1])) - products
    sums = torch.stack([residual.square().sum((1, 2)), sizes], 1)
    roots = bounds_from_residuals(sums, failures, shifts, rounding, room)
    # The inverse of a power of two is one.
    return multiplied_up(roots, scales.reciprocal())


def bounds_from_residuals(
    sums: Tensor, failures: Tensor, shifts: Tensor, rounding: float, room: float
) -> Tensor:
    r"""Upper bounds of the norms of B, infinite where unproved. t is 2^-150 at least.

    Args:
        sums: $\|R\|_F^2$ and $\|B\|_F^2 + \|L\|_F^2$, (n, 2).
        failures: not 0 where a factorisation failed.
        shifts: t.
        rounding: what entries of the residual are off by, relative to the sums of magnitudes.
        room: for the squares' sums and what is rounded here.
    """
    squares, sizes = sums.unbind(1)
    infinity = shifts.new_full((), math.inf)
    residual = squares.sqrt() + sizes * rounding
    # The step to the next number covers the sum's rounding and, as a half of it is 2^-54 t at
    # least, every underflow.
    bounds = torch.nextafter(shifts.add(residual, alpha=room), infinity)
    roots = torch.where(failures == 0, torch.nextafter(bounds.sqrt(), infinity), infinity)
    return roots.nan_to_num_(nan=math.inf, posinf=math.inf)

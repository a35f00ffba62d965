r"""What is proved of symbols at single frequencies: from their Gram matrices, or from themselves.

Whatever a Cholesky factor L by any library is, $L L^*$ is positive semidefinite, so
that $\lambda_{\max}(G) \le t + \|t I - G - L L^*\|_2$ (docs/bounds.md, "Convolutions on CUDA").
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.ops._conv_symbols import ROOT_OF_TWO, SymbolStack
from lipfast.ops.cholesky_bounds import bounds_from_residuals
from lipfast.ops.hermitian_residual import hermitian_residual
from lipfast.ops.shifted_grams import LEAST_SHIFT
from lipfast.rounding import UNIT_ROUNDOFF, WIDE, wide_gamma


def _factored(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors by rows, as a library has them, and where it failed."""
    # Torch's factors are stored by columns, and so is a transpose: no copy changes the order. The
    # transpose is the conjugate, so that its factor from above is this one's transpose.
    upper, failures = torch.linalg.cholesky_ex(shifted.mT, upper=True)
    return upper.mT, failures


def _bounds(sums: Tensor, failures: Tensor, shifts: Tensor) -> Tensor:
    """Bounds of the norms; `sums`, (n, 2), of squares and of what rounding leaves beside them."""
    return bounds_from_residuals(sums, failures, shifts, 1.0, WIDE * WIDE)


def prove_grams(
    stack: SymbolStack, errors: Tensor, at: tuple[Tensor, Tensor], targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Proved upper bounds of $\|\hat W(\theta_i)\|_2$, infinite where unproved, from the products.

    Args:
        stack: with products.
        errors: its `gram_errors`.
        at: symbols (P,) and centres (P, 3).
        targets: (P,): what is to be proved. t is a little below its square.

    Returns:
        The bounds, the matrices t I - G, and t.
    """
    n, _ = stack.sides
    room = errors[at[0]]
    # Below by what the residual of an exact factor is bounded by; a shift proves what it proves.
    slack = 8 * n * wide_gamma(2 * n + 2)
    shifts = (targets.square() * (1 - slack) - 4 * room).clamp_min(LEAST_SHIFT)
    shifted = stack.shifted_grams(*at, shifts)
    factors, failures = _factored(shifted)
    sums = hermitian_residual(shifted, shifted[:, :, :0], factors)
    # The last term: of t in the diagonal's rounding, u |t - g|; that of g is in the room.
    room = room.add(shifts, alpha=2 * UNIT_ROUNDOFF)
    rounding = sums[:, 1].mul_(ROOT_OF_TWO * wide_gamma(2 * n) * WIDE).add_(room)
    sums = torch.stack([sums[:, 0], rounding], 1)
    return _bounds(sums, failures, shifts), shifted, shifts


def prove(real: Tensor, imaginary: Tensor, gram: Tensor, targets: Tensor) -> Tensor:
    r"""Proved upper bounds of $\|B_i\|_2$, infinite where unproved.

    Args:
        real: parts of the matrices B (P, n, m).
        imaginary: alike.
        gram: B B^*, complex, as a library has it.
        targets: (P,): what is to be proved. t is a little below its square.
    """
    n, m = real.shape[1:]
    slack = 8 * n * wide_gamma(2 * (n + m) + 1)
    shifts = (targets.square() * (1 - slack)).clamp_min(LEAST_SHIFT)
    shifted = gram.neg()
    shifted.diagonal(dim1=1, dim2=2).add_(shifts[:, None])
    factors, failures = _factored(shifted)
    identity = torch.diag_embed(shifts[:, None].expand(-1, n)).to(shifted.dtype)
    sums = hermitian_residual(identity, torch.complex(real, imaginary), factors)
    sums[:, 1].mul_(ROOT_OF_TWO * wide_gamma(2 * (n + m)) * WIDE)
    return _bounds(sums, failures, shifts)

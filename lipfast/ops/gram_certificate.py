"""Proved upper bounds of many spectral norms through batched factorisations of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipfast.ops._keyed import CHOLESKY
from lipfast.ops.cholesky_residual import cholesky_residual
from lipfast.ops.scaling import scaled, unscaled_up
from lipfast.ops.sides import is_wide, wide
from lipfast.ops.vectors import Vectors
from lipfast.rounding import WIDE, wide_gamma

_ATTEMPTS = 7
# Of a proof and a lower bound from its factor; the vectors that this is found among.
_ROUNDS, _SUBSPACE = 8, 8


@dataclass(frozen=True)
class Proofs:
    """What was proved of each of N matrices.

    Attributes:
        upper: never below the norm; infinite where nothing was proved.
        starts: where the bound is not within rtol of the lower one, a vector (cols) from which
            Lanczos finds a better lower bound; None elsewhere.
    """

    upper: list[float]
    starts: list[Tensor | None]


def prove_upper_bounds(
    matrices: Sequence[Tensor], lower: Sequence[float], *, rtol: float, memory: int
) -> Proofs:
    r"""Upper bounds of $\|W_i\|_2$ near given lower ones, in batches of matrices of one shape.

    With B = W scaled by a power of two, smaller side first, any t > 0 and **any** matrix L,

    $\lambda_{\max}(B B^T) \le t + \|t I - B B^T - L L^T\|_2$,

    because $L L^T$ is positive semidefinite. L is a Cholesky factor of $t I - B B^T$, from whatever
    library; the residual's Frobenius norm is computed anew in float64 with its rounding accounted
    for (`cholesky_residual`), so nothing that a library returns enters the proof unchecked. t
    starts just above the lower bound's square and grows where the factorisation fails.

    Args:
        matrices: finite, not zero, float32 or float64, all on one device.
        lower: positive lower bounds, one each.
        rtol: of the first shift.
        memory: bytes that one matrix's Gram matrix may take, and a batch's together.
    """
    proofs = Proofs([math.inf] * len(matrices), [None] * len(matrices))
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault((min(matrix.shape), max(matrix.shape)), []).append(index)
    for (side, length), indices in shapes.items():
        if 8 * side * side > memory:
            continue
        # B, its Gram matrix, the shifted one, the factor and a product.
        batch = max(1, memory // (8 * (side * length + 4 * side * side)))
        for first in range(0, len(indices), batch):
            _prove_batch(matrices, lower, rtol, indices[first : first + batch], proofs)
    return proofs


def _prove_batch(
    matrices: Sequence[Tensor],
    lower: Sequence[float],
    rtol: float,
    indices: Sequence[int],
    proofs: Proofs,
) -> None:
    b, exponents = scaled(torch.stack([wide(matrices[index].double()) for index in indices]))
    below = [math.ldexp(lower[i], -e) for i, e in zip(indices, exponents, strict=True)]
    square = torch.tensor([value * value for value in below], dtype=b.dtype, device=b.device)
    pending, excess = list(range(len(indices))), rtol
    for attempt in range(_ATTEMPTS):
        chosen = torch.tensor(pending, device=b.device)
        some = b if len(pending) == len(indices) else b[chosen]
        bounds, factors = _bound_squares(some, square[chosen] * (1 + excess))
        failed = []
        for position, (local, bound) in enumerate(zip(pending, bounds.tolist(), strict=True)):
            if not math.isfinite(bound):
                failed.append(local)
                continue
            index = indices[local]
            root = math.nextafter(math.sqrt(bound), math.inf)
            proofs.upper[index] = unscaled_up(root, exponents[local])
            if attempt > 0:
                proofs.starts[index] = _top_vector(matrices[index], factors[position])
        pending, excess = failed, 16 * excess
        if not pending:
            return


def _bound_squares(b: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the largest eigenvalues of B B^T, infinite where unproved; the factors."""
    _, side, length = b.shape
    shifted = torch.baddbmm(torch.diag_embed(shifts[:, None].expand(-1, side)), b, b.mT, alpha=-1)
    factors, failures = torch.linalg.cholesky_ex(shifted)
    squares, sizes = cholesky_residual(b, factors, shifts).unbind(1)
    # Sums of k < 2^30 numbers: off by less than 2^-22, relatively, which WIDE covers; 2^-400 and
    # 2^-900 are far above every underflow together.
    rounding = wide_gamma(side + length + 1) * (sizes * WIDE)
    residual = (squares * WIDE + 2.0**-400).sqrt() * WIDE + rounding
    bounds = torch.nextafter(
        shifts + (residual + 2.0**-900) * WIDE, torch.full_like(shifts, math.inf)
    )
    return torch.where((failures == 0) & torch.isfinite(bounds), bounds, math.inf), factors


def _top_vector(matrix: Tensor, factor: Tensor) -> Tensor:
    """A right vector near the top singular one: subspace iteration with (t I - B B^T)^-1.

    t may be further from the top than the next singular values are: a few vectors find it there.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    size = len(factor), min(_SUBSPACE, len(factor))
    basis = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(factor)
    for _ in range(4):
        basis = torch.linalg.qr(torch.cholesky_solve(basis, factor))[0]
    projected = basis.mT @ torch.cholesky_solve(basis, factor)
    vector = basis @ torch.linalg.eigh(projected)[1][:, -1]
    right: Tensor = matrix.detach().double().mT @ vector if is_wide(*matrix.shape) else vector
    right = right / right.abs().amax()
    unit: Tensor = right / right.norm()
    return unit


@dataclass(frozen=True)
class Brackets:
    """What the native op returns of N matrices, vectors one per matrix."""

    lower: Tensor
    upper: Tensor
    passes: Tensor
    codes: Tensor
    right: Sequence[Tensor] | Vectors
    left: Sequence[Tensor] | Vectors


LowerBounds = Callable[[list[Tensor], list[Tensor]], Brackets]
"""Lower bounds of matrices from start vectors."""


@torch.no_grad()
def _tightened(
    matrices: Sequence[Tensor], found: Brackets, estimate: LowerBounds, rtol: float, memory: int
) -> Brackets:
    lower, upper, passes = found.lower.tolist(), found.upper.tolist(), found.passes.tolist()
    codes, right, left = found.codes.tolist(), list(found.right), list(found.left)
    todo = [index for index, value in enumerate(lower) if value > 0 and codes[index] != CHOLESKY]
    for _ in range(_ROUNDS):
        some = [matrices[index] for index in todo]
        proofs = prove_upper_bounds(
            some, [lower[index] for index in todo], rtol=rtol, memory=memory
        )
        for index, value in zip(todo, proofs.upper, strict=True):
            if value < upper[index]:
                upper[index], codes[index] = value, CHOLESKY
        loose = [
            (index, start)
            for index, start in zip(todo, proofs.starts, strict=True)
            if start is not None
        ]
        if not loose:
            break
        better = estimate([matrices[index] for index, _ in loose], [start for _, start in loose])
        new_passes, todo = better.passes.tolist(), []
        for position, ((index, _), value) in enumerate(
            zip(loose, better.lower.tolist(), strict=True)
        ):
            passes[index] += new_passes[position]
            if value > lower[index]:
                lower[index] = value
                right[index], left[index] = better.right[position], better.left[position]
                todo.append(index)

    def like(values: list[Any], tensor: Tensor) -> Tensor:
        return torch.tensor(values, dtype=tensor.dtype, device=tensor.device)

    return Brackets(
        like(lower, found.lower),
        like(upper, found.upper),
        like(passes, found.passes),
        like(codes, found.codes),
        right,
        left,
    )


def tighten(
    matrices: Sequence[Tensor], found: Brackets, estimate: LowerBounds, *, rtol: float, memory: int
) -> Brackets:
    """Brackets with upper bounds by Cholesky where they can be had, about rtol from the lower ones.

    Where the first shift fails, the spectrum is denser at the top than Lanczos took it for: the
    factor that is found in the end then gives a start vector for a better lower bound, and that a
    tighter shift. Gradients are those of `found`.
    """
    better = _tightened(matrices, found, estimate, rtol, memory)
    return replace(
        better,
        lower=_WithValue.apply(found.lower, better.lower),  # type: ignore[no-untyped-call]
        upper=_WithValue.apply(found.upper, better.upper),  # type: ignore[no-untyped-call]
    )


class _WithValue(torch.autograd.Function):
    """Another value, exactly, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None

"""Prove a block tridiagonal matrix positive by the residual of a factor that nobody has to trust.

The proof of `verify`, which shares nothing with what finds multipliers and proves them first
(docs/bounds.md, "Checking a certificate"): other scaling, other factorisation, other error terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipfast.rounding import gamma

# For sums of numbers that are not negative: four products one after the other, 2^28 terms each.
_UPWARDS = 1.0 + 2.0**-20
_LARGEST_NUMBER = 2.0**50
_LONGEST = 2**26
_SHIFT = 10_000
_FACTORISATIONS = 4


@dataclass(frozen=True)
class Block:
    """Rows of one matrix of a chain, scaled so that the proof's matrix has about 1 on its diagonal.

    Attributes:
        weight: G, (n, n_before): the matrix times powers of two, as it is stored.
        error: what G is off by at most, entry by entry, or None.
        before: (n_before,) multipliers of the block before, scaled; None for the first block.
        mean: m of the block before.
        product: p of the block before.
        own: (n,) multipliers of this block, scaled.
    """

    weight: Tensor
    error: Tensor | None
    before: Tensor | None
    mean: Tensor
    product: Tensor
    own: Tensor

    def constrained(self) -> Tensor:
        """``|p| d`` of the block before; ones for the inputs, whose matrix is the identity."""
        ones = torch.ones_like(self.product)
        return ones if self.before is None else self.product.abs() * self.before


def _half_exponents(values: Tensor) -> Tensor:
    """q with ``values 4^-q`` in [1/4, 1)."""
    return (torch.frexp(values).exponent.long() + 1).div(2, rounding_mode="floor")


def power_scaled(values: Tensor, exponents: Tensor) -> Tensor:
    """``values 2^exponents``, rounded once: exact but for what becomes denormal.

    `torch.ldexp` multiplies by a power of two that may itself overflow.
    """
    shifts = exponents.clamp(-_SHIFT, _SHIFT).to(torch.int32)
    with np.errstate(over="ignore", under="ignore"):  # infinity, which the caller refuses
        return torch.from_numpy(np.ldexp(values.detach().double().numpy(), shifts.numpy()))


def scaled_blocks(
    weights: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    boxes: Sequence[tuple[Tensor, Tensor]],
    *,
    multipliers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    maps: Sequence[int],
) -> list[Block] | str:
    """The blocks of the matrix of a certificate; or why there are none.

    Args:
        weights: (n_i, n_{i-1}), as they are stored.
        errors: what they are off by, or None.
        boxes: m and p of every activation, (n_i,) each.
        multipliers: D_i of every matrix, the last of them rho^2 in every entry.
        exponents: e_i of every matrix, the last of them zeros.
        maps: s_i.
    """
    blocks: list[Block] = []
    columns = torch.zeros(weights[0].shape[1], dtype=torch.int64)
    mean, product = (torch.zeros(weights[0].shape[1], dtype=torch.float64) for _ in "mp")
    before: Tensor | None = None
    rows = zip(weights, errors, multipliers, exponents, maps, strict=True)
    for index, (weight, error, own, units, shift) in enumerate(rows):
        # First by the size of D, so that the diagonal is in range, and then by the diagonal.
        halves = _half_exponents(own)
        for last in (False, True):
            powers = (units.long() - halves - shift)[:, None] - columns
            scaled, d = power_scaled(weight, powers), power_scaled(own, -2 * halves)
            if not last:
                sizes = d if before is None else d + scaled.square() @ (product * before)
                if not bool(((sizes > 0) & (sizes < torch.inf)).all()):
                    return f"block {index + 1} has a diagonal entry that is not positive"
                halves = halves + _half_exponents(sizes)
        wide = None if error is None else power_scaled(error, powers)
        blocks.append(Block(scaled, wide, before, mean, product, d))
        columns, before = units.long() - halves, d
        if index < len(boxes):
            mean, product = boxes[index]
    numbers = [t for b in blocks for t in (b.weight, b.error, b.mean, b.product, b.own)]
    if not all(
        bool((t.abs() <= _LARGEST_NUMBER).all()) for t in numbers if t is not None and t.numel()
    ):
        return "scaled numbers are NaN, infinite or above 2^50"
    return blocks


def why_not_positive(blocks: Sequence[Block]) -> str | None:
    """Why the matrix is not proved to be positive semidefinite; None: it is.

    For any numbers L, B = L L^T + eta + R with a diagonal eta >= 0 and R the residual, so that B is
    positive where eta - |R| is diagonally dominant. eta begins with what is expected of the
    roundings, and becomes what they are.
    """
    if max(max(block.weight.shape) for block in blocks) >= _LONGEST:
        return "a matrix has a side of 2^26 or more"
    matrix = [_matrix_blocks(block) for block in blocks]
    sizes = [entry.diagonal() for entry, _ in matrix]
    if not all(bool(((size > 0.125) & (size < 4)).all()) for size in sizes):
        return "a diagonal entry is lost in cancellation"
    weights = [size.sqrt() for size in sizes]
    widths = [len(size) for size in sizes]
    eta = []
    for index, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        width = sum(widths[max(index - 1, 0) : index + 2])
        eta.append(size * (width * gamma(sum(block.weight.shape)) / 4))
    for _ in range(_FACTORISATIONS):
        factor = _proposed_factor(blocks, matrix, eta)
        if isinstance(factor, str):
            return factor
        needed = _needed(blocks, matrix, eta, factor, weights)
        pairs = list(zip(needed, eta, weights, strict=True))
        if all(bool((need * _UPWARDS <= have * w).all()) for need, have, w in pairs):
            return None
        eta = [torch.maximum(have, 1.1 * need / w) for need, have, w in pairs]
    return "what roundings may amount to is more than there is room for: take a larger rho"


def _matrix_blocks(block: Block) -> tuple[Tensor, Tensor | None]:
    """A block on the diagonal of B, without the inputs' part, and the one to its left."""
    if block.before is None:
        return torch.diag(block.own), None
    bent = block.weight * (block.product * block.before)
    return torch.diag(block.own) + bent @ block.weight.T, block.weight * (block.mean * block.before)


def _proposed_factor(
    blocks: Sequence[Block], matrix: Sequence[tuple[Tensor, Tensor | None]], eta: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]] | str:
    """Blocks of some L, on the diagonal and to the left of it: a proposal."""
    found: list[tuple[Tensor, Tensor]] = []
    for index, ((diagonal, left), lower) in enumerate(zip(matrix, eta, strict=True)):
        if left is None:
            side = blocks[index].weight
        else:
            side = torch.linalg.solve_triangular(found[-1][0], left.T, upper=False).T
        root, info = torch.linalg.cholesky_ex(diagonal - torch.diag(lower) - side @ side.T)
        # LAPACK answers NaN with NaN and no word.
        if int(info) != 0 or not bool(torch.isfinite(root).all()):
            return f"block {index + 1} of {len(blocks)} is not positive: no bound is proved by it"
        found.append((root, side))
    return found


def _needed(
    blocks: Sequence[Block],
    matrix: Sequence[tuple[Tensor, Tensor | None]],
    eta: Sequence[Tensor],
    factor: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Weighted row sums of all that B may differ by from ``L L^T + eta``."""
    needed = [torch.zeros_like(own) for own in eta]
    for index, (block, (diagonal, left), (root, side)) in enumerate(
        zip(blocks, matrix, factor, strict=True)
    ):
        w = weights[index]
        rest = diagonal - torch.diag(eta[index]) - root @ root.T - side @ side.T
        needed[index] += (rest.abs() @ w + rest.abs().T @ w) / 2
        needed[index] += gamma(sum(block.weight.shape) + 8) * _sizes_on_diagonal(
            block, eta[index], root.abs(), side.abs(), w
        )
        if block.error is not None:
            needed[index] += _error_on_diagonal(block, block.error, w)
        if left is None:
            continue
        # An entry left of the diagonal counts in its row, and in the row that it is a column of.
        before, above = factor[index - 1][0], weights[index - 1]
        apart = (left - side @ before.T).abs()
        row, column = _roundings_left(left.abs(), side.abs(), before.abs(), w, above)
        needed[index] += apart @ above + row
        needed[index - 1] += apart.T @ w + column
        if block.error is not None:
            row, column = _error_left(block, block.error, w, above)
            needed[index] += row
            needed[index - 1] += column
    return needed


def _roundings_left(
    left: Tensor, side: Tensor, before: Tensor, w: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column sums of what is rounded in a block to the left of the diagonal."""
    rounding = gamma(len(above) + 8)
    row = left @ above + side @ (before.T @ above)
    return rounding * row, rounding * (left.T @ w + before @ (side.T @ w))


def _error_left(block: Block, error: Tensor, w: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of ``E |m| d``."""
    assert block.before is not None
    coupled = block.mean.abs() * block.before
    return error @ (coupled * above), coupled * (error.T @ w)


def _sizes_on_diagonal(block: Block, eta: Tensor, root: Tensor, side: Tensor, w: Tensor) -> Tensor:
    """Row sums of the sizes of all terms of a block of the residual on the diagonal."""
    total = (block.own + eta) * w + root @ (root.T @ w) + side @ (side.T @ w)
    if block.before is None:
        return total
    sizes = block.weight.abs()
    return total + sizes @ (block.constrained() * (sizes.T @ w))


def _error_on_diagonal(block: Block, error: Tensor, w: Tensor) -> Tensor:
    """Row sums of ``E c |G|^T + |G| c E^T + E c E^T``."""
    sizes, c = block.weight.abs(), block.constrained()
    return error @ (c * (sizes.T @ w)) + (sizes + error) @ (c * (error.T @ w))

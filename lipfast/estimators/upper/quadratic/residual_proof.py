"""Prove block tridiagonal matrices positive by residuals of factors that nobody has to trust.

The proof of `verify`, which shares nothing with what finds multipliers and proves them first on the
CPU (docs/bounds.md, "Checking a certificate"): other scaling, other factorisation, other error
terms. And the first proof of networks on a device, all of them together: tensors may have a
dimension of networks before those that are said here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops.scaling import powers_of_two
from lipfast.rounding import gamma

# For sums of numbers that are not negative: four products one after the other, 2^28 terms each.
_UPWARDS = 1.0 + 2.0**-20
_LARGEST_NUMBER = 2.0**50
_LONGEST = 2**26
# Of a diagonal entry of the scaled matrix.
_LEAST_SIZE, _LARGEST_SIZE = 0.125, 4.0
# A number with such an exponent is 0, or infinite.
_LEAST_EXPONENT, _LARGEST_EXPONENT = -1200, 1100
_FACTORISATIONS = 4
# Of what one factorisation has to do with, beside what rounding is expected to need.
_ETA_ROOM = 4.0


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

    Example:
        >>> import torch
        >>> values = torch.tensor([2.0**-1070, 0.0], dtype=torch.float64)
        >>> power_scaled(values, torch.tensor([1071, 5]))
        tensor([2., 0.], dtype=torch.float64)
    """
    mantissas, own = torch.frexp(values.detach().double())
    total = (own + exponents).clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT)
    half = total.div(2, rounding_mode="floor")
    # The first product is far from both ends of the range.
    return mantissas * powers_of_two(total - half) * powers_of_two(half)


def row_sums(matrix: Tensor, vector: Tensor) -> Tensor:
    """Row sums of matrices (.., n, m), columns weighted by vectors (.., m)."""
    return (matrix @ vector[..., None])[..., 0]


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
    shifts = [torch.tensor([shift]) for shift in maps]
    blocks, right = blocks_of(
        weights, errors, boxes, multipliers=multipliers, exponents=exponents, maps=shifts
    )
    for index, own in enumerate(right):
        if not bool(own):
            return f"block {index + 1} has a diagonal entry that is not positive"
    if not bool(_within_range(blocks)):
        return "scaled numbers are NaN, infinite or above 2^50"
    return blocks


def blocks_of(
    weights: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    boxes: Sequence[tuple[Tensor, Tensor]],
    *,
    multipliers: Sequence[Tensor],
    exponents: Sequence[Tensor],
    maps: Sequence[Tensor],
) -> tuple[list[Block], list[Tensor]]:
    """`scaled_blocks` without a look at them: also whether the diagonal of each can be scaled.

    Arguments are those of `scaled_blocks`, but for `maps`, (1,) each.
    """
    blocks: list[Block] = []
    right: list[Tensor] = []
    columns = torch.zeros_like(weights[0][..., 0, :], dtype=torch.int64)
    mean = product = torch.zeros_like(columns, dtype=torch.float64)
    before: Tensor | None = None
    rows = zip(weights, errors, multipliers, exponents, maps, strict=True)
    for index, (weight, error, own, units, shift) in enumerate(rows):
        # First by the size of D, so that the diagonal is in range, and then by the diagonal.
        halves = _half_exponents(own)
        if before is not None:
            powers = (units.long() - halves - shift)[..., None] - columns[..., None, :]
            bent = row_sums(power_scaled(weight, powers).square(), product * before)
            sizes = power_scaled(own, -2 * halves) + bent
            right.append(((sizes > 0) & (sizes < torch.inf)).all(-1))
            halves = halves + _half_exponents(sizes)
        else:
            right.append(((own > 0) & (own < torch.inf)).all(-1))
        powers = (units.long() - halves - shift)[..., None] - columns[..., None, :]
        d = power_scaled(own, -2 * halves)
        wide = None if error is None else power_scaled(error, powers)
        blocks.append(Block(power_scaled(weight, powers), wide, before, mean, product, d))
        columns, before = units.long() - halves, d
        if index < len(boxes):
            mean, product = boxes[index]
    return blocks, right


def _within_range(blocks: Sequence[Block]) -> Tensor:
    found = []
    for block in blocks:
        for numbers in (block.weight, block.error, block.mean, block.product, block.own):
            if numbers is not None:
                # Stored weights are a matrix, all else that is said of units a row.
                matrix = numbers is block.weight or numbers is block.error
                fits = numbers.abs() <= _LARGEST_NUMBER
                found.append(fits.flatten(-2).all(-1) if matrix else fits.all(-1))
    total = found[0]
    for own in found[1:]:
        total = total & own
    return total


def proved_together(
    blocks: Sequence[Block], right: Sequence[Tensor], eta: Sequence[Tensor]
) -> Tensor:
    """Whether matrices of N networks are positive semidefinite, (N,); nothing is looked at.

    As `why_not_positive`, of one factorisation of each.

    Args:
        blocks: of `blocks_of`, with a dimension of networks.
        right: alike.
        eta: per block (N, n) numbers >= 0, such as `expected_roundings`.
    """
    matrix = [matrix_blocks(block) for block in blocks]
    sizes = [entry.diagonal(dim1=-2, dim2=-1) for entry, _ in matrix]
    weights = [size.sqrt() for size in sizes]
    factor = [(root, side) for root, side, _ in _block_factors(blocks, matrix, eta)]
    needed = _needed(blocks, matrix, eta, factor, weights)
    found = _within_range(blocks)
    for own in right:
        found = found & own
    for size, need, have, w in zip(sizes, needed, eta, weights, strict=True):
        in_range = (size > _LEAST_SIZE) & (size < _LARGEST_SIZE)
        found = found & (in_range & (have >= 0) & (need * _UPWARDS <= have * w)).all(-1)
    return found


def expected_roundings(blocks: Sequence[Block]) -> list[Tensor]:
    """About what eta has to be, from the sizes of the diagonal: no part of a proof."""
    sizes = [matrix_blocks(block)[0].diagonal(dim1=-2, dim2=-1) for block in blocks]
    weights = [size.sqrt() for size in sizes]
    widths = [size.shape[-1] for size in sizes]
    found = []
    for index, (block, w) in enumerate(zip(blocks, weights, strict=True)):
        rounding = gamma(sum(block.weight.shape[-2:]) + 8)
        width = sum(widths[max(index - 1, 0) : index + 2])
        found.append(_ETA_ROOM * width * rounding * w + rounding * _sizes_of_entries(block, w))
        if block.error is None:
            continue
        found[index] = found[index] + _error_on_diagonal(block, block.error, w)
        if index:
            row, column = _error_left(block, block.error, w, weights[index - 1])
            found[index] = found[index] + row
            found[index - 1] = found[index - 1] + column
    return [1.1 * own / w for own, w in zip(found, weights, strict=True)]


def why_not_positive(blocks: Sequence[Block]) -> str | None:
    """Why the matrix is not proved to be positive semidefinite; None: it is.

    For any numbers L, B = L L^T + eta + R with a diagonal eta >= 0 and R the residual, so that B is
    positive where eta - |R| is diagonally dominant. eta begins with what is expected of the
    roundings, and becomes what they are.
    """
    if max(max(block.weight.shape) for block in blocks) >= _LONGEST:
        return "a matrix has a side of 2^26 or more"
    matrix = [matrix_blocks(block) for block in blocks]
    sizes = [entry.diagonal() for entry, _ in matrix]
    in_range = [(size > _LEAST_SIZE) & (size < _LARGEST_SIZE) for size in sizes]
    if not all(bool(own.all()) for own in in_range):
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


def matrix_blocks(block: Block) -> tuple[Tensor, Tensor | None]:
    """A block on the diagonal of B, without the inputs' part, and the one to its left."""
    own = torch.diag_embed(block.own)
    if block.before is None:
        return own, None
    bent = block.weight * (block.product * block.before)[..., None, :]
    left = block.weight * (block.mean * block.before)[..., None, :]
    return own + bent @ block.weight.mT, left


def _proposed_factor(
    blocks: Sequence[Block], matrix: Sequence[tuple[Tensor, Tensor | None]], eta: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]] | str:
    """Blocks of some L, on the diagonal and to the left of it: a proposal."""
    found: list[tuple[Tensor, Tensor]] = []
    for index, (root, side, info) in enumerate(_block_factors(blocks, matrix, eta)):
        # LAPACK answers NaN with NaN and no word.
        if int(info) != 0 or not bool(torch.isfinite(root).all()):
            return f"block {index + 1} of {len(blocks)} is not positive: no bound is proved by it"
        found.append((root, side))
    return found


def _block_factors(
    blocks: Sequence[Block], matrix: Sequence[tuple[Tensor, Tensor | None]], eta: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    root: Tensor | None = None
    for block, (diagonal, left), lower in zip(blocks, matrix, eta, strict=True):
        side = block.weight
        if root is not None and left is not None:
            side = torch.linalg.solve_triangular(root, left.mT, upper=False).mT
        lowered = diagonal - torch.diag_embed(lower) - side @ side.mT
        root, info = torch.linalg.cholesky_ex(lowered)
        yield root, side, info


def _needed(
    blocks: Sequence[Block],
    matrix: Sequence[tuple[Tensor, Tensor | None]],
    eta: Sequence[Tensor],
    factor: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Weighted row sums of all that B may differ by from ``L L^T + eta``."""
    needed: list[Tensor] = []
    for index, (block, (diagonal, left), (root, side)) in enumerate(
        zip(blocks, matrix, factor, strict=True)
    ):
        w = weights[index]
        rest = diagonal - torch.diag_embed(eta[index]) - root @ root.mT - side @ side.mT
        sizes = _sizes_of_entries(block, w) + eta[index] * w
        sizes = sizes + _sizes_of_factor(root.abs(), w) + _sizes_of_factor(side.abs(), w)
        rounding = gamma(sum(block.weight.shape[-2:]) + 8)
        own = (row_sums(rest.abs(), w) + row_sums(rest.abs().mT, w)) / 2 + rounding * sizes
        if block.error is not None:
            own = own + _error_on_diagonal(block, block.error, w)
        needed.append(own)
        if left is None:
            continue
        # An entry left of the diagonal counts in its row, and in the row that it is a column of.
        before, above = factor[index - 1][0], weights[index - 1]
        apart = (left - side @ before.mT).abs()
        parts = [
            (row_sums(apart, above), row_sums(apart.mT, w)),
            _roundings_left(left.abs(), side.abs(), before.abs(), w, above),
        ]
        if block.error is not None:
            parts.append(_error_left(block, block.error, w, above))
        for row, column in parts:
            needed[index] = needed[index] + row
            needed[index - 1] = needed[index - 1] + column
    return needed


def _roundings_left(
    left: Tensor, side: Tensor, before: Tensor, w: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column sums of what is rounded in a block to the left of the diagonal."""
    rounding = gamma(above.shape[-1] + 8)
    row = row_sums(left, above) + row_sums(side, row_sums(before.mT, above))
    return rounding * row, rounding * (
        row_sums(left.mT, w) + row_sums(before, row_sums(side.mT, w))
    )


def _error_left(block: Block, error: Tensor, w: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of ``E |m| d``."""
    assert block.before is not None
    coupled = block.mean.abs() * block.before
    return row_sums(error, coupled * above), coupled * row_sums(error.mT, w)


def _sizes_of_entries(block: Block, w: Tensor) -> Tensor:
    """Row sums of the sizes of all terms of a block of B on the diagonal."""
    if block.before is None:
        return block.own * w
    sizes = block.weight.abs()
    return block.own * w + row_sums(sizes, block.constrained() * row_sums(sizes.mT, w))


def _sizes_of_factor(part: Tensor, w: Tensor) -> Tensor:
    """Row sums of ``|L| |L|^T``, of the sizes of a block of L."""
    return row_sums(part, row_sums(part.mT, w))


def _error_on_diagonal(block: Block, error: Tensor, w: Tensor) -> Tensor:
    """Row sums of ``E c |G|^T + |G| c E^T + E c E^T``."""
    sizes, c = block.weight.abs(), block.constrained()
    crossed = row_sums(sizes + error, c * row_sums(error.mT, w))
    return row_sums(error, c * row_sums(sizes.mT, w)) + crossed

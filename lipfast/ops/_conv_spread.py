r"""How far the Gram matrices of a symbol are from their mean over all frequencies, proved.

With $E \ge \|G(\theta) - R_0\|_2$ for all $\theta$, a cell costs at most $2 E \sin^2 D$ beside the
value at its centre (docs/bounds.md, "Without a look"): nothing for symbols that are equally large
at all frequencies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lipfast.ops._conv_ascent import start_vectors
from lipfast.ops._conv_cells import Cells
from lipfast.ops._conv_proofs import prove_grams
from lipfast.ops._conv_symbols import SymbolStack, batches, top_vectors
from lipfast.ops.fetched import sent
from lipfast.rounding import WIDE

# The level whose cells are looked at, by axes: 2 D is pi / 8 there, and 3 pi / 8 on three axes.
_LEVEL_LOOKED_AT = {1: 2, 2: 2, 3: 1}
# Steps of Lanczos' process there, and by what part their largest value may be too small.
_STEPS, _ROOM, _SQUARINGS_OF_SPREADS = 16, 1.05, 24


def spread_of_products(stack: SymbolStack, errors: Tensor) -> Tensor:
    r"""(N,): E of every symbol, at most $2 \sum_{j > 0} \|R_j\|_2$.

    A norm is at most the Frobenius norm, and the root of the largest row sum times the largest
    column sum.

    Args:
        stack: with products.
        errors: its `gram_errors`: the mean and what is beside it are within them.
    """
    assert stack.products is not None
    beside = stack.products[:, 1:].abs()
    if not beside.shape[1]:
        return errors
    squares = torch.minimum(
        beside.square().sum((2, 3)), beside.sum(2).amax(2) * beside.sum(3).amax(2)
    )
    # Squares may underflow, each by 2^-1075 at most.
    return 2 * WIDE * WIDE * (squares + 2.0**-1000).sqrt().sum(1) + errors


def spread_at_cells(
    stack: SymbolStack, cells: Cells, errors: Tensor, *, seed: int, memory: int
) -> Tensor:
    r"""(N,): E of every symbol, from what is beside the mean at the centres of a covering.

    $E \cos 2D \le \max_c \|G(c) - R_0\|_2$; infinite where that was not proved.

    Args:
        stack: with products.
        cells: not a grid's.
        errors: its `gram_errors`.
        seed: of start vectors.
        memory: bytes.
    """
    assert stack.products is not None
    level, centres = _LEVEL_LOOKED_AT[cells.axes], cells.roots()
    for depth in range(level):
        centres, _ = cells.children(centres, depth)
    places, count = sent(centres, stack.taps.device), len(stack.taps)
    products = stack.products.clone()
    products[:, 0] = 0
    beside = replace(stack, products=products)
    opposite = replace(stack, products=-products)
    symbols = torch.arange(count, device=places.device)[:, None].expand(-1, len(places)).flatten()
    flat = places.repeat(count, 1)
    start = start_vectors(1, stack.sides[0], seed, stack.taps)
    parts = list(batches(len(flat), max(1, memory // (2 * stack.bytes_per_symbol()))))
    # Lanczos' process is of positive semidefinite matrices.
    shifts = spread_of_products(stack, errors)[symbols]
    found = [
        top_vectors(
            own.shifted_grams(symbols[part], flat[part], shifts[part]),
            start.expand(len(flat[part]), -1),
            _STEPS,
            _SQUARINGS_OF_SPREADS,
        )[0]
        - shifts[part]
        for own in (beside, opposite)
        for part in parts
    ]
    largest = torch.cat(found).reshape(2, count, -1).amax((0, 2)).clamp_min(0)
    # Of less than the errors nothing is left by rounding.
    targets = (largest * _ROOM + 4 * errors).sqrt()
    bounds = [
        prove_grams(own, errors, (symbols[part], flat[part]), targets[symbols[part]])[0]
        for own in (beside, opposite)
        for part in parts
    ]
    proved = torch.cat(bounds).reshape(2, count, -1).amax((0, 2)).square()
    return proved * (WIDE / _cosine_of_twice(cells, level))


def _cosine_of_twice(cells: Cells, level: int) -> float:
    """At most cos 2D of a level's cells, from that lower bound of cos D: 2 cos^2 D - 1."""
    return (2 * cells.cosine(level) ** 2 - 1) * (1 - 2.0**-40)

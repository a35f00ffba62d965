"""Quadratic constraints of many chains on a device: queued, and read when somebody asks.

Part of the proof: it says of which matrices `residual_proof` proves what is returned. Nothing here
looks at a number on the device, and every network does the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.residual_proof import (
    Block,
    blocks_of,
    expected_roundings,
    proved_together,
)
from lipfast.estimators.upper.quadratic.stacked_search import (
    best_start,
    closed_form,
    from_earlier,
    stacked_search,
)
from lipfast.estimators.upper.quadratic.stacked_sweep import (
    StackedChains,
    balancing_exponents,
    log_largest,
    rescaled,
    stacked_sweep,
)
from lipfast.ops.fetched import Fetched

# By what multipliers grow from a layer to the next: as much of what rounding needs, at least, and
# then so many times as much where that proves nothing, with as much more room for roundings.
_SHARE, _LEAST_EXCESS = 8.0, 1e-9
_GROWTH_ATTEMPTS = ((1.0, 1.0), (32.0, 4.0))
# Of the closed form, see there.
_SHARES = 1.0, 0.5
# Logarithms of multipliers that are of no use to start from are beyond.
_LARGEST_LOG = 900.0


class ChainsOnDevice(NamedTuple):
    """N chains on a device, and what is known of them.

    Attributes:
        weights: per map (N, n_i, n_{i-1}), float64.
        errors: alike, what they are off by entry by entry; or None.
        means: m, per hidden layer (N, n_i) or (1, n_i), float64.
        products: p, alike.
        curved: per hidden layer whether p is anything but 0.
    """

    weights: Sequence[Tensor]
    errors: Sequence[Tensor | None]
    means: Sequence[Tensor]
    products: Sequence[Tensor]
    curved: Sequence[bool]


def bytes_of_one(shapes: Sequence[tuple[int, int]]) -> int:
    """What the proof of one network takes, more than the search: of matrices (outputs, inputs)."""
    held = sum(2 * rows * rows + 4 * rows * columns for rows, columns in shapes)
    return 8 * (held + 4 * max(max(shape) ** 2 for shape in shapes))


class ProvedChains(NamedTuple):
    r"""Certificates of N chains; as `lipfast.ops.chain_quadratic.ChainQuadratic` has them.

    Attributes:
        squares: (N,), float64, $\rho^2$ of the scaled chains; inf where nothing was proved.
        multipliers: per hidden layer (N, n_i), float64.
        logs: alike, of the chains as they are; on the device.
        unit_exponents: per hidden layer (N, n_i), int32.
        weight_exponents: (N, L), int32.
    """

    squares: Tensor
    multipliers: Sequence[Tensor]
    logs: Sequence[Tensor]
    unit_exponents: Sequence[Tensor]
    weight_exponents: Tensor


class ProvedLater:
    """Bounds of chains on a device, queued when this is made.

    Args:
        take: the numbers of some of them.
        batches: which, one after the other.
        evaluations: of the search.
        start: per hidden layer (N, n_i), `ProvedChains.logs` of similar networks, NaN where there
            are none; or None.
    """

    def __init__(
        self,
        take: Callable[[slice], ChainsOnDevice],
        batches: Sequence[slice],
        *,
        evaluations: int,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        parts = []
        for chosen in batches:
            chains = take(chosen)
            own = None if start is None else [logs[chosen] for logs in start]
            parts.append(_proved_chains(chains, evaluations, own))
        self._sizes = [mean.shape[-1] for mean in chains.means]
        columns = zip(*parts, strict=True)
        fields = [column[0] if len(column) == 1 else torch.cat(column) for column in columns]
        self._logs = fields.pop()
        self._read = Fetched(fields)

    def read(self) -> ProvedChains:
        """What was proved."""
        squares, multipliers, units, maps = self._read.read()
        return ProvedChains(
            squares,
            torch.split(multipliers, self._sizes, 1),
            torch.split(self._logs, self._sizes, 1),
            torch.split(units, self._sizes, 1),
            maps,
        )


def _proved_chains(
    chains: ChainsOnDevice, evaluations: int, start: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """Squares, multipliers and exponents of units and maps, and logs in the units of the chains."""
    units = balancing_exponents(chains.weights)
    weights, maps = rescaled(chains.weights, units)
    products = [
        product if curved else None
        for product, curved in zip(chains.products, chains.curved, strict=True)
    ]
    scaled = StackedChains(weights, chains.means, products)
    # Log2 of D of the chains as they are, less that of the scaled ones.
    passed = 2 * maps.cumsum(1)
    shifts = [passed[:, layer, None] - 2 * own for layer, own in enumerate(units)]
    starts = [closed_form(scaled, share) for share in _SHARES]
    if start is not None:
        # NaN, too, is nothing to start from: then it is a start that is there already.
        known = torch.cat([own - shift for own, shift in zip(start, shifts, strict=True)], 1)
        fits = (known.abs() < _LARGEST_LOG).all(1, keepdim=True)
        earlier = torch.where(fits, known.nan_to_num(0.0).exp2(), starts[0].exp())
        starts.append(from_earlier(scaled, torch.split(earlier, scaled.sizes, 1)))
    logs = best_start(scaled, starts)
    logs = stacked_search(scaled, logs, evaluations)
    multipliers = torch.split(logs.exp(), scaled.sizes, 1)
    largest = log_largest(stacked_sweep(scaled, lambda layer, _: multipliers[layer]).last).exp()
    squares, grown = _certified(chains, list(multipliers), largest, units, maps)
    found = torch.cat(grown, 1)
    return (
        squares,
        found,
        torch.cat(units, 1).int(),
        maps.int(),
        found.log2() + torch.cat(shifts, 1),
    )


def _certified(
    chains: ChainsOnDevice,
    multipliers: list[Tensor],
    largest: Tensor,
    units: list[Tensor],
    maps: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The least of a few rho^2 that is proved, and the multipliers that prove it.

    Every attempt takes D_i (1 + delta)^i and rho^2 (1 + delta)^{h+1}, which every layer has room in
    for what rounding may amount to.
    """
    exponents = [*units, torch.zeros_like(chains.weights[-1][..., 0], dtype=torch.int64)]
    boxes = list(zip(chains.means, chains.products, strict=True))
    shifts = torch.split(maps, 1, 1)
    last = largest[:, None]

    def grown(excess: Tensor) -> tuple[list[Tensor], list[Block], list[Tensor]]:
        base = (1 + excess)[:, None]
        d = [own * base ** (layer + 1) for layer, own in enumerate([*multipliers, last])]
        wide = [*d[:-1], d[-1].expand(exponents[-1].shape)]
        blocks, right = blocks_of(
            chains.weights, chains.errors, boxes, multipliers=wide, exponents=exponents, maps=shifts
        )
        return d, blocks, right

    _, blocks, _ = grown(torch.full_like(largest, _LEAST_EXCESS))
    pairs = zip(expected_roundings(blocks), blocks, strict=True)
    excess = torch.stack([(own / block.own).amax(1) for own, block in pairs]).amax(0)
    excess = (_SHARE * excess).clamp_min(_LEAST_EXCESS)
    squares, kept = torch.full_like(largest, math.inf), multipliers
    for share, room in reversed(_GROWTH_ATTEMPTS):
        d, blocks, right = grown(share * excess)
        eta = [room * own for own in expected_roundings(blocks)]
        proved = proved_together(blocks, right, eta)
        squares = torch.where(proved, d.pop()[:, 0], squares)
        kept = [torch.where(proved[:, None], new, old) for new, old in zip(d, kept, strict=True)]
    return squares, kept

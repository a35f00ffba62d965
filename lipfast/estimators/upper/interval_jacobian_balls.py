"""Jacobians as balls: every entry within a radius of a middle, for many networks at once.

Part of the proof of the interval Jacobian: docs/bounds.md derives every term for rounding, and
`lipfast.ops.chain_interval_jacobian` has the same ones for chains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF, gamma, widened

_HULL = 8 * UNIT_ROUNDOFF


class Balls(NamedTuple):
    """Middles and radii of the entries of Jacobians, (networks, outputs, entries) in float64.

    Attributes:
        middle: may be NaN or infinite, and then stays so: nothing is known.
        radius: alike.
    """

    middle: Tensor
    radius: Tensor

    def with_slopes(self, lower: Tensor, upper: Tensor) -> Balls:
        """Times every slope between two, which broadcast: the hull of four products."""
        least, most = self.middle - self.radius, self.middle + self.radius
        ends = [end * slope for end in (least, most) for slope in (lower, upper)]
        low = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
        high = torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))
        size = torch.maximum(low.abs(), high.abs())
        # Slopes of 0 make numbers of what is none.
        lost = (self.middle - self.middle) + (self.radius - self.radius)
        return Balls((low + high) / 2 + lost, ((high - low) / 2 + size * _HULL + UNDERFLOW) + lost)

    def times(self, weights: Tensor, errors: Tensor | None) -> Balls:
        """Times (networks, rows, columns), for all matrices within errors of these."""
        terms, size = weights.shape[1], self.middle.abs()
        radius = torch.bmm(self.radius + gamma(terms + 4) * size, weights.abs())
        if errors is not None:
            radius = radius + torch.bmm(size + self.radius, errors)
        return Balls(torch.bmm(self.middle, weights), widened(radius, 2 * terms + 8) + UNDERFLOW)

    def moved(self, source: Tensor, count: int, entries: int) -> Balls:
        """Entry i added to entry `source[i]` of as many zeros, at most `count` to each."""
        shape = (*self.middle.shape[:2], entries)
        middle = self.middle.new_zeros(shape).index_add_(2, source, self.middle)
        if count <= 1:
            return Balls(middle, self.radius.new_zeros(shape).index_add_(2, source, self.radius))
        radius = self.radius + gamma(count) * self.middle.abs()
        radius = self.radius.new_zeros(shape).index_add_(2, source, radius)
        return Balls(middle, widened(radius, count + 4) + UNDERFLOW)

    def sizes(self) -> Tensor:
        """The largest magnitudes of entries, with one rounding."""
        return self.middle.abs() + self.radius


def together(balls: Sequence[Balls]) -> Balls:
    """The sum of several."""
    if len(balls) == 1:
        return balls[0]
    middle, radius, share = balls[0].middle, balls[0].radius, gamma(len(balls))
    size = middle.abs()
    for other in balls[1:]:
        middle, radius = middle + other.middle, radius + other.radius
        size = size + other.middle.abs()
    return Balls(middle, widened(radius + share * size, 2 * len(balls) + 4) + UNDERFLOW)


def largest_sums(inputs: Sequence[Balls], norm: float) -> Tensor:
    """Norms of Jacobians whose columns are those of several inputs; inf where nothing is known."""
    if math.isinf(norm):
        sums = torch.stack([balls.sizes().sum(2) for balls in inputs]).sum(0)
        terms = sum(balls.middle.shape[2] for balls in inputs) + len(inputs)
    else:
        sums = torch.cat([balls.sizes().sum(1) for balls in inputs], 1)
        terms = inputs[0].middle.shape[1]
    found = widened(sums.amax(1), terms + 4)
    return torch.where(found < math.inf, found, math.inf)

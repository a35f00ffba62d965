"""Jacobians as balls: every entry within a radius of a middle, for many networks at once.

Part of the proof of the interval Jacobian: docs/bounds.md derives every term for rounding, and
`lipfast.ops.chain_interval_jacobian` has the same ones for chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF, gamma, widened

_HULL = 8 * UNIT_ROUNDOFF

SlopeEnd: TypeAlias = "float | Tensor"
"""Of all entries, or (1 or networks, 1, entries)."""


class Balls(NamedTuple):
    """Middles and radii of the entries of Jacobians, (networks, outputs, entries) in float64.

    Few operations each: on a device they are launches.

    Attributes:
        middle: may be NaN or infinite, and then stays so: nothing is known.
        radius: alike; None where the middle is the entry itself.
    """

    middle: Tensor
    radius: Tensor | None

    def with_slopes(self, lower: SlopeEnd, upper: SlopeEnd) -> Balls:
        """Times every slope between two: the hull of four products."""
        if self.radius is None:
            return self._exact_with_slopes(lower, upper)
        least, most = self.middle - self.radius, self.middle + self.radius
        if isinstance(lower, float) and (lower, upper) == (0.0, 1.0):
            low, high = least.clamp_max(0.0), most.clamp_min(0.0)
        else:
            ends = [end * slope for end in (least, most) for slope in (lower, upper)]
            low, high = torch.aminmax(torch.stack(ends), dim=0)
        middle, width = (low + high) * 0.5, (high - low) * (0.5 + _HULL)
        return Balls(middle, torch.add(width, middle.abs(), alpha=_HULL) + UNDERFLOW)

    def _exact_with_slopes(self, lower: SlopeEnd, upper: SlopeEnd) -> Balls:
        ends = [torch.as_tensor(end, dtype=torch.float64) for end in (lower, upper)]
        if isinstance(lower, float):
            ends = [end.cpu() for end in ends]
        mean = (ends[0] + ends[1]) * 0.5
        steepest = torch.maximum(ends[0].abs(), ends[1].abs())
        reach = torch.maximum(ends[1] - mean, mean - ends[0])
        reach = widened(reach + _HULL * steepest, 4)
        middle, radius = (end.item() if isinstance(lower, float) else end for end in (mean, reach))
        return Balls(self.middle * middle, self.middle.abs() * radius + UNDERFLOW)

    def times(self, weights: Tensor, errors: Tensor | None) -> Balls:
        """Times (networks, rows, columns), for all matrices within errors of these."""
        terms, size = weights.shape[1], self.middle.abs()
        room = widened(1.0, 2 * terms + 10)
        share = gamma(terms + 4) * room
        if self.radius is None:
            reach = size * share + UNDERFLOW
        else:
            reach = torch.add(self.radius * room, size, alpha=share)
        radius = torch.bmm(reach, weights.abs())
        if errors is not None:
            whole = size if self.radius is None else size + self.radius
            radius = radius + torch.bmm(whole * room, errors)
        return Balls(torch.bmm(self.middle, weights), radius + UNDERFLOW)

    def moved(self, source: Tensor, count: int, entries: int) -> Balls:
        """Entry i added to entry `source[i]` of as many zeros, at most `count` to each."""
        shape = (*self.middle.shape[:2], entries)

        def added(side: Tensor) -> Tensor:
            return side.new_zeros(shape).index_add_(2, source, side)

        if count <= 1:
            return Balls(added(self.middle), None if self.radius is None else added(self.radius))
        reach = gamma(count) * self.middle.abs()
        reach = reach if self.radius is None else self.radius + reach
        return Balls(added(self.middle), widened(added(reach), count + 4) + UNDERFLOW)

    def on_both(self, function: Callable[[Tensor], Tensor]) -> Balls:
        """What only picks or arranges entries, of middles and radii."""
        return Balls(function(self.middle), None if self.radius is None else function(self.radius))

    def sizes(self) -> Tensor:
        """The largest magnitudes of entries, with one rounding."""
        size = self.middle.abs()
        return size if self.radius is None else size + self.radius


def together(balls: Sequence[Balls]) -> Balls:
    """The sum of several."""
    if len(balls) == 1:
        return balls[0]
    middle, reach = balls[0].middle, balls[0].middle.abs() * gamma(len(balls))
    for other in balls[1:]:
        middle = middle + other.middle
        reach = reach + other.middle.abs() * gamma(len(balls))
    for one in balls:
        reach = reach if one.radius is None else reach + one.radius
    return Balls(middle, widened(reach, 2 * len(balls) + 4) + UNDERFLOW)


def largest_sums(inputs: Sequence[Balls], norm: float) -> Tensor:
    """Norms of Jacobians whose columns are those of several inputs; NaN or inf: not known."""
    if math.isinf(norm):
        sums = inputs[0].sizes().sum(2)
        for balls in inputs[1:]:
            sums = sums + balls.sizes().sum(2)
        terms = sum(balls.middle.shape[2] for balls in inputs) + len(inputs)
    else:
        sums = torch.cat([balls.sizes().sum(1) for balls in inputs], 1)
        terms = inputs[0].middle.shape[1]
    return widened(sums.amax(1), terms + 4)

"""Inputs that have the slopes of a pattern, as nearly as can be found.

Heuristic: a pattern need not be reached by any input. What an activation reads is asked to lie
where its slope is the pattern's: by least squares for the first activations, which read linear
functions of the input, then for all of them by steps along the gradient of squared distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.errors import LipfastError
from lipfast.estimators.floor.linear_graph import LinearGraph, PatternUnits
from lipfast.estimators.floor.search import BestPatterns, PatternSearch
from lipfast.estimators.floor.starts import read_by
from lipfast.estimators.lower.networks import activations_of
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.interpret import NodeArguments, walk

# Where slopes are looked at: from near a kink at 0 to where sigmoids are flat.
_NEAREST, _FARTHEST, _EACH_SIDE = 0.02, 40.0, 48
# Slopes are alike within this part of their range.
_LIKE_ENOUGH = 0.1
# How far inside, and how far out least squares aim, in units of what activations read at samples.
_INSIDE_BY = 0.05
_AIMS = (0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
_STEPS, _KEPT_EVERY = 150, 50
# Of Adam, relative to the size of an input.
_RATE = 0.02
_MOST_IMPORTANT = 10.0


class _Wanted(NamedTuple):
    """Where the units of one activation shall read: in the first or the last of two intervals.

    Attributes:
        units: the activation.
        low: ends of the intervals, (2, *shape).
        high: ends of the intervals, (2, *shape).
        weights: how much each unit counts, (*shape).
        scale: size of what the units read at samples.
    """

    units: PatternUnits
    low: Tensor
    high: Tensor
    weights: Tensor
    scale: float

    def distances(self, z: Tensor) -> Tensor:
        """How far (P, *shape) lie outside the nearer interval, less a margin."""
        margin = ((self.high - self.low) / 4).clamp_max(_INSIDE_BY * self.scale)
        z = z.unsqueeze(1)
        below = (self.low + margin - z).clamp_min(0)
        above = (z - self.high + margin).clamp_min(0)
        return (below + above).amin(1)

    def aims(self, z: Tensor, size: float) -> Tensor:
        """One number for each unit in the interval that is nearer to z (*shape)."""
        out = size * self.scale
        low, high = self.low, self.high
        middle = torch.where(low.isinf(), high - out, torch.where(high.isinf(), low + out, 0.0))
        both = low.isfinite() & high.isfinite()
        middle = torch.where(both, (low + high) / 2, middle)
        apart = (middle - z).abs()
        return torch.where(apart[0] <= apart[1], middle[0], middle[1])


@plain_arithmetic()
def inputs_of_pattern(
    search: PatternSearch,
    pattern: BestPatterns,
    near: Tensor,
    inside: Callable[[Tensor], Tensor],
) -> Tensor:
    """Inputs (P, *shape) in float64 whose slopes resemble the best pattern of one network.

    Args:
        search: of one network with one input.
        pattern: what it found.
        near: samples (S, *shape), from which steps start too.
        inside: moves points (P, *shape) into the set where to look.
    """
    values = _operands_at(search, near)
    asked = [_wanted(search, pattern, index, z) for index, z in enumerate(values)]
    wanted = [own for own in asked if own is not None]
    if not wanted:
        return near
    starts = torch.cat([_by_least_squares(search, wanted, near), near])
    found = _stepped(search, wanted, inside(starts), inside)
    fine = torch.isfinite(found.reshape(len(found), -1)).all(1)
    return found[fine]


def _operands_at(search: PatternSearch, x: Tensor) -> list[Tensor]:
    """What all activations read at inputs (P, *shape): (P, *shape) each."""
    plan = search.plan
    values = walk(plan.graph, search.parameters, plan.constants, [x.unsqueeze(0)], keep=True)
    linear, parameters = search.linear, search.parameters
    return [read_by(unit, linear, parameters, values)[0] for unit in linear.units]


def _wanted(search: PatternSearch, pattern: BestPatterns, index: int, z: Tensor) -> _Wanted | None:
    """Where slopes are like the pattern's; None where the op cannot be asked."""
    unit = search.linear.units[index]
    importance = pattern.importance[index][0].abs()
    half = torch.logspace(
        math.log10(_NEAREST), math.log10(_FARTHEST), _EACH_SIDE, dtype=z.dtype, device=z.device
    )
    grid = torch.cat([-half.flip(0), half])
    found = _slopes_on(search, unit, grid)
    if found is None:
        return None
    low, high = (end[0, 0] for end in search.ends[index])
    alike = (found - pattern.slopes[index][0]).abs() <= _LIKE_ENOUGH * (high - low)
    first, last = _runs(alike, grid)
    mean = importance.mean()
    weights = (importance / torch.where(mean > 0, mean, 1.0)).clamp_max(_MOST_IMPORTANT)
    scale = float(z.square().mean().sqrt())
    return _Wanted(
        unit,
        torch.stack([first[0], last[0]]),
        torch.stack([first[1], last[1]]),
        torch.where(alike.any(0), weights, 0.0),
        scale if math.isfinite(scale) and scale > 0 else 1.0,
    )


def _slopes_on(search: PatternSearch, unit: PatternUnits, grid: Tensor) -> Tensor | None:
    """Derivatives of an activation (G, *shape), where all units read a number of the grid."""
    node = search.linear.known.node(unit.name)
    if node.op == "lipfast.composition":  # known as several ops only
        return None
    with torch.enable_grad():
        z = grid.reshape(1, -1, *[1] * len(unit.shape)).expand(1, -1, *unit.shape)
        z = z.clone().requires_grad_()
        try:
            values = NodeArguments(node, {unit.source: z}, search.parameters, {}).replaced({}, {})
        except (LipfastError, KeyError):  # reads constants
            return None
        (slopes,) = torch.autograd.grad(values.sum(), z, materialize_grads=True)
    return slopes[0]


def _runs(alike: Tensor, grid: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ends of the first and of the last interval of the grid where units are true."""
    between = (grid[1:] + grid[:-1]) / 2
    infinity = grid.new_full((1,), math.inf)
    edges = torch.cat([-infinity, between, infinity])

    def run(true: Tensor) -> tuple[Tensor, Tensor]:
        begins = true.int().argmax(0)
        places = torch.arange(len(true), device=true.device)
        places = places.reshape(-1, *[1] * (true.dim() - 1))
        stops = ~true & (places > begins)
        ends = torch.where(stops.any(0), stops.int().argmax(0), len(true))
        return begins, ends

    first = run(alike)
    begins, ends = run(alike.flip(0))
    size = len(alike)
    return (edges[first[0]], edges[first[1]]), (edges[size - ends], edges[size - begins])


def _by_least_squares(search: PatternSearch, wanted: Sequence[_Wanted], near: Tensor) -> Tensor:
    """Inputs at which the first activations read what they shall, for several sizes of it."""
    first = _first_units(search.linear)
    own = [entry for entry in wanted if entry.units.name in first]
    columns = near[0].numel()
    if not own or 8 * (columns + 1) * activations_of(search.plan) > search.memory // 4:
        return near[:0]
    eye = torch.eye(columns, dtype=near.dtype, device=near.device)
    points = torch.cat([torch.zeros_like(eye[:1]), eye]).reshape(-1, *near.shape[1:])
    names = [unit.name for unit in search.linear.units]
    read, there = _operands_at(search, points), _operands_at(search, near[:1])
    rows, sums, roots, places = [], [], [], []
    for entry in own:
        z = read[names.index(entry.units.name)].reshape(len(points), -1)
        rows.append((z[1:] - z[0]).mT)
        sums.append(z[0])
        roots.append(entry.weights.reshape(-1).sqrt())
        places.append(there[names.index(entry.units.name)][0])
    root = torch.cat(roots)
    matrix = root[:, None] * torch.cat(rows)
    aims = [
        torch.cat([e.aims(z, size).reshape(-1) for e, z in zip(own, places, strict=True)])
        for size in _AIMS
    ]
    sides = root[:, None] * (torch.stack(aims, 1) - torch.cat(sums)[:, None])
    if not bool(torch.isfinite(matrix).all() & torch.isfinite(sides).all()):
        return near[:0]
    try:
        solutions: Tensor = torch.linalg.pinv(matrix, rtol=1e-9) @ sides
    except RuntimeError:  # LAPACK's iteration has not converged
        return near[:0]
    return solutions.mT.reshape(-1, *near.shape[1:])


def _first_units(linear: LinearGraph) -> set[str]:
    """Names of the activations that read linear functions of the input."""
    units = {unit.name for unit in linear.units}
    behind: set[str] = set()
    for node in linear.known.nodes:
        if any(name in behind or name in units for name in node.names("node")):
            behind.add(node.name)
    return units - behind


def _stepped(
    search: PatternSearch,
    wanted: Sequence[_Wanted],
    x: Tensor,
    inside: Callable[[Tensor], Tensor],
) -> Tensor:
    """Projected steps of Adam from each point; the points themselves and some on the way."""
    found = [x]
    names = [unit.name for unit in search.linear.units]
    size = x.reshape(len(x), -1).square().mean(1).sqrt()
    rate = (_RATE * torch.where(size > 0, size, 1.0)).reshape(-1, *[1] * (x.dim() - 1))
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, _STEPS + 1):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            read = _operands_at(search, leaf)
            losses = [
                (entry.weights * (entry.distances(read[at]) / entry.scale).square()).mean()
                for entry in wanted
                for at in [names.index(entry.units.name)]
            ]
            (gradient,) = torch.autograd.grad(sum(losses), leaf, materialize_grads=True)  # type: ignore[arg-type]
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient.square()
        root = (square / (1 - 0.99**step)).sqrt()
        move = mean / (1 - 0.9**step) / torch.where(root > 0, root, 1.0)
        x = inside(x - rate * (1 - step / (_STEPS + 1)) * move)
        search.advance(1)
        if step % _KEPT_EVERY == 0:
            found.append(x)
    return torch.cat(found)

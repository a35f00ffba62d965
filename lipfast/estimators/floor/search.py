"""Slopes with a large norm, of many networks at once: several starts, then flips of single units.

Heuristic, see `ascent`. Every network of a call does the same work, from the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.floor.ascent import Patterns
from lipfast.estimators.floor.linear_graph import LinearGraph, NoSlopesError, linear_graph
from lipfast.estimators.floor.starts import slopes_at
from lipfast.estimators.jacobian.directions import steepest_direction
from lipfast.estimators.jacobian.function import separate_inputs
from lipfast.estimators.lower.networks import activations_of, bytes_of_parameters
from lipfast.norms import Norm
from lipfast.ops.fetched import sent
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.state import device_of

STARTS = {1: 4, 2: 8, 3: 32}
"""Random starts, by effort; those that are given come on top."""
_ROUNDS = {1: 15, 2: 30, 3: 60}
_FLIPS = {1: 1, 2: 4, 3: 16}
# Rounds in which slopes stay: u and v of a new pattern.
_FIRST_ROUNDS = 3
# After flips: fewer, as all else is as good as it was.
_AFTER_FLIPS = 8
# Patterns with flips that are tried at once; of as few units each alone.
_FLIPPED_TOGETHER = 32
_FEW_UNITS = 64
# Columns or rows that are raised each by itself, for norms 1 and inf.
_AXES = 32
# Sides of Jacobians that are made whole; the directions of others come from rounds.
_WHOLE = 128
_LAST_ROUNDS = 60


@dataclass(frozen=True, eq=False)
class BestPatterns:
    """The best patterns of N networks.

    Attributes:
        slopes: per activation (N, *shape).
        directions: (N, D) of norm 1.
        importance: per activation (N, *shape): what each unit adds to the norm, by its slope.
    """

    slopes: list[Tensor]
    directions: Tensor
    importance: list[Tensor]


class _Climbers(NamedTuple):
    """Patterns to start from.

    Attributes:
        slopes: per activation (N, S, *shape), between the ends.
        directions: (N, S, D).
    """

    slopes: Sequence[Tensor]
    directions: Tensor


_Pattern = tuple[Sequence[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PatternSearch:
    """What the search needs of N networks.

    Attributes:
        plan: their architecture.
        linear: its linear graph.
        parameters: stacked, but for slopes.
        ends: of the slopes, (N, 1, *shape) each.
        norm: 1, 2 or inf.
        effort: 1, 2 or 3.
        seed: of the random numbers.
        memory: bytes for the rows of a Jacobian.
        advance: told of every round.
    """

    plan: Architecture
    linear: LinearGraph
    parameters: Mapping[str, Tensor]
    ends: Sequence[tuple[Tensor, Tensor]]
    norm: Norm
    effort: int
    seed: int
    memory: int
    advance: Callable[[int], None]

    @plain_arithmetic()
    def run(self, networks: int, points: Tensor | None) -> BestPatterns:
        """The best patterns that are found.

        Args:
            networks: N.
            points: (N, D...), inputs whose slopes are starts; several inputs are flattened and
                joined.
        """
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        begin = self._starts(networks, points, generator)
        rounds = _ROUNDS[self.effort]
        slopes, v = self._best(*self._climbed(begin, _FIRST_ROUNDS, rounds))
        if self.norm != 2:
            found = self._along_axes(networks, rounds, generator)
            slopes, v = self._better((slopes, v), self._best(*found))
        for turn in range(_FLIPS[self.effort] if self._count else 0):
            flipped = self._flipped(slopes, v, generator, single=turn == 0)
            slopes, v = self._best(*self._climbed(flipped, _FIRST_ROUNDS, _AFTER_FLIPS))
        return self._settled(slopes, v)

    @property
    def _device(self) -> torch.device:
        return device_of(self.parameters)

    @property
    def _count(self) -> int:
        return sum(math.prod(unit.shape) for unit in self.linear.units)

    def _patterns(self, slopes: Sequence[Tensor]) -> Patterns:
        return Patterns(self.linear, self.parameters, self.ends, slopes)

    def _starts(
        self, networks: int, points: Tensor | None, generator: torch.Generator
    ) -> _Climbers:
        """Slopes in the middle, at the upper ends, and random corners; those at points."""
        count = STARTS[self.effort]
        columns = self.linear.plan.jacobian_shape[1]
        v = torch.randn(count, columns, generator=generator, dtype=torch.float64, device="cpu")
        slopes = []
        for low, high in self.ends:
            shape = (count, *low.shape[2:])
            share = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            share = (share < 0.5).double()
            share[0], share[1] = 0.5, 1.0
            share = sent(share, low.device)
            slopes.append(torch.lerp(low, high, share).clamp(low, high))
        v = sent(v, self._device).expand(networks, -1, -1)
        if points is None:
            return _Climbers(slopes, v)
        near = self._slopes_at(points)
        pairs = zip(near, slopes, strict=True)
        steepest = self._steepest(near, v[:, :1])
        return _Climbers([torch.cat(pair, 1) for pair in pairs], torch.cat([steepest, v], 1))

    def _slopes_at(self, points: Tensor) -> list[Tensor]:
        shapes = self.plan.input_shapes
        parts = [part.unsqueeze(1) for part in separate_inputs(points.double(), shapes)]
        return slopes_at(self.plan, self.linear, self.parameters, self.ends, parts)

    def _climbed(
        self, start: _Climbers, held: int, rounds: int, pinned: Tensor | None = None
    ) -> tuple[_Climbers, Tensor]:
        """Where all starts end, with the norms there (N, S); half of the way pinned to axes."""
        patterns, v, u = self._patterns(start.slopes), start.directions, None
        for turn in range(held + rounds):
            patterns.move(turn >= held)
            v, u = patterns.round(v, u, self.norm, pinned if 2 * turn < rounds else None)
            self.advance(1)
        patterns.images(v)  # slopes move once more on the way
        return _Climbers(patterns.slopes, v), self._size(patterns.slopes, v)

    def _along_axes(
        self, networks: int, rounds: int, generator: torch.Generator
    ) -> tuple[_Climbers, Tensor]:
        """Columns of norm 1 and rows of norm inf, one start for each: the largest is one of them.

        Left alone each start would raise the one that is large already.
        """
        count = self.linear.plan.jacobian_shape[1 if self.norm == 1 else 0]
        order = torch.randperm(count, generator=generator, device="cpu")[:_AXES]
        axes = sent(torch.eye(count, dtype=torch.float64, device="cpu")[order], self._device)
        pinned = axes.expand(networks, -1, -1)
        columns = self.linear.plan.jacobian_shape[1]
        v = pinned if self.norm == 1 else pinned.new_ones(networks, len(axes), columns)
        middle = [
            ((low + high) / 2).clamp(low, high).expand(-1, len(axes), *low.shape[2:])
            for low, high in self.ends
        ]
        return self._climbed(_Climbers(middle, v), 0, rounds, pinned)

    def _best(self, found: _Climbers, sizes: Tensor) -> tuple[list[Tensor], Tensor]:
        """One pattern (N, 1, *shape) and direction (N, 1, D) of each network."""
        best = sizes.argmax(1)
        rows = torch.arange(len(best), device=best.device)
        return [own[rows, best, None] for own in found.slopes], found.directions[rows, best, None]

    def _flipped(
        self, slopes: Sequence[Tensor], v: Tensor, generator: torch.Generator, *, single: bool
    ) -> _Climbers:
        """The pattern itself, and with some of its slopes at the other end."""
        few = single and self._count <= _FEW_UNITS
        if few:
            chosen = torch.eye(self._count, dtype=torch.bool, device="cpu")
        else:
            scores = torch.rand(_FLIPPED_TOGETHER, self._count, generator=generator, device="cpu")
            # From one unit to a twentieth of them.
            most = math.log(max(1.0, self._count / 20))
            shares = torch.linspace(0, most, _FLIPPED_TOGETHER, device="cpu").exp() / self._count
            chosen = scores < shares[:, None]
            chosen[torch.arange(_FLIPPED_TOGETHER), scores.argmin(1)] = True
        chosen = torch.cat([torch.zeros_like(chosen[:1]), chosen])
        sizes = [math.prod(unit.shape) for unit in self.linear.units]
        found = []
        for own, part, (low, high) in zip(
            slopes, torch.split(chosen, sizes, 1), self.ends, strict=True
        ):
            flips = sent(part, own.device).reshape(1, len(chosen), *own.shape[2:])
            found.append(torch.where(flips, torch.where(own == high, low, high), own))
        return _Climbers(found, v.expand(-1, len(chosen), -1))

    def _settled(self, slopes: list[Tensor], v: Tensor) -> BestPatterns:
        """The directions as exactly as they can be had; slopes move once more before."""
        v = self._steepest(slopes, v)
        found, _ = self._climbed(_Climbers(slopes, v), 1, _AFTER_FLIPS)
        slopes, v = self._better((slopes, v), (found.slopes, found.directions))
        v = self._steepest(slopes, v)
        patterns = self._patterns(slopes)
        patterns.round(v, None, self.norm)
        importance = [
            (cell.reaches * cell.returns)[:, 0]  # type: ignore[operator]
            for cell in patterns.cells
        ]
        return BestPatterns([own[:, 0] for own in slopes], v[:, 0], importance)

    def _better(self, first: _Pattern, second: _Pattern) -> tuple[list[Tensor], Tensor]:
        """Of two patterns of each network the one with the larger norm in its direction."""
        takes = self._size(*second) > self._size(*first)

        def chosen(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(takes.reshape(-1, *[1] * (old.dim() - 1)), new, old)

        slopes = [chosen(*pair) for pair in zip(first[0], second[0], strict=True)]
        return slopes, chosen(first[1], second[1])

    def _size(self, slopes: Sequence[Tensor], v: Tensor) -> Tensor:
        images = self._patterns(slopes).images(v)
        length = torch.linalg.vector_norm(v, self.norm, dim=2)
        sizes: Tensor = torch.linalg.vector_norm(images, self.norm, dim=2) / length
        return torch.nan_to_num(sizes, nan=-1.0)

    def _steepest(self, slopes: Sequence[Tensor], v: Tensor) -> Tensor:
        rows, columns = self.linear.plan.jacobian_shape
        side = min(rows, columns)
        activations = activations_of(self.linear.plan)
        patterns = self._patterns(slopes)
        if side > _WHOLE or 32 * len(v) * side * activations > self.memory:
            u = None
            for _ in range(_LAST_ROUNDS):
                v, u = patterns.round(v, u, self.norm)
            return v
        eye = torch.eye(side, dtype=v.dtype, device=v.device).expand(len(v), -1, -1)
        if columns <= rows:
            jacobians = patterns.images(eye).mT
        else:
            with torch.enable_grad():
                leaf = v.new_zeros(len(v), rows, columns).requires_grad_()
                images = patterns.images(leaf)
            (jacobians,) = torch.autograd.grad(images, leaf, eye, materialize_grads=True)
        return steepest_direction(jacobians, self.norm).unsqueeze(1)


def pattern_search(
    plan: Architecture,
    networks: Sequence[Mapping[str, Tensor]],
    *,
    norm: Norm,
    effort: int,
    seed: int,
    memory: int,
    advance: Callable[[int], None],
) -> PatternSearch | str:
    """A search over the slopes of some networks, or why there is none."""
    try:
        with plain_arithmetic():
            linear = linear_graph(plan)
            parameters, ends = linear.parameters(plan, networks), linear.ends(plan, networks)
    except NoSlopesError as reason:
        return str(reason)
    return PatternSearch(plan, linear, parameters, ends, norm, effort, seed, memory, advance)


def networks_at_once(plan: Architecture, effort: int, memory: int) -> int:
    """How many fit into memory while they are searched."""
    patterns = max(STARTS[effort], _FLIPPED_TOGETHER, _FEW_UNITS) + 1
    each = 2 * bytes_of_parameters(plan) + 8 * 6 * patterns * activations_of(plan)
    return max(1, int(memory // each))

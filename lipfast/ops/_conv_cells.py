"""Cells of frequencies that cover half of the torus, and their splitting, in whole tensors.

What(-theta) is What(theta)'s conjugate, so that half is enough. On one axis cells are intervals, on
two diamonds |x_0|/w_0 + |x_1|/w_1 <= 1, on which sum_a d_a |x_a| is at most max_a d_a w_a, on three
diamonds times intervals. All numbers are integers in units of 2^-40 cycles. The CPU's kernel does
the same (csrc/kernels/cpu/conv_cells.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops.fetched import sent

CYCLE = 2**40
_DEEPEST_LEVEL = 24
# Taken off a cosine: more than it, its argument and the quotient are rounded by.
_COSINE_ERROR = 64 * 2.0**-53


@dataclass(frozen=True)
class Cells:
    """Cells of one shape of taps, or the points of a grid.

    Attributes:
        taps: per axis (3); those with several come first.
        periods: denominators of the frequencies: of a grid, or `CYCLE` on every axis.
        on_grid: whether the frequencies are a grid's.
    """

    taps: tuple[int, int, int]
    periods: tuple[int, int, int]
    on_grid: bool

    @property
    def axes(self) -> int:
        """How many have several taps."""
        return sum(count > 1 for count in self.taps)

    @property
    def children_of_one(self) -> int:
        """How many a cell has, mirror images included."""
        return (0, 2, 4, 8)[self.axes]

    def roots(self) -> Tensor:
        """Centres (P, 3) of level 0, on the CPU; of a grid, its points."""
        counts, steps = [1, 1, 1], [0, 0, 0]
        for axis in range(self.axes):
            steps[axis] = 1 if self.on_grid else self._width(axis, 0)
            if not self.on_grid and self._is_interval(axis):
                steps[axis] *= 2
            counts[axis] = self.periods[axis] // steps[axis]
        ranges = [torch.arange(count, device="cpu") for count in counts]
        index = torch.cartesian_prod(*ranges)
        if not self.on_grid and self.axes >= 2:
            index = index[(index[:, 0] + index[:, 1]) % 2 == 0]
        centres = index * torch.tensor(steps, device="cpu")
        return centres[self._is_kept(centres)]

    def children(self, centres: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Centres (Q, 3) of the next level, which cover those given, and their parents."""
        found, keep = self.all_children(centres, level)
        parents = torch.arange(len(centres), device=centres.device)
        return found[keep], parents[:, None].expand_as(keep)[keep]

    def all_children(self, centres: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Centres (P, C, 3) of the next level, and which of them are needed to cover the parents.

        Of a cell that is its own mirror image, one child of each mirrored pair is enough.
        """
        half = [self._width(axis, level) // 2 for axis in range(self.axes)]
        moves = [[-half[0], 0, 0], [half[0], 0, 0]]
        if self.axes >= 2:
            moves += [[0, -half[1], 0], [0, half[1], 0]]
        if self.axes == 3:
            moves = [[*move[:2], step] for move in moves for step in (-half[2], half[2])]
        periods = sent(self.periods, centres.device)
        found = (centres[:, None] + sent(moves, centres.device)) % periods
        return found, ~(2 * centres % periods == 0).all(1)[:, None] | self._is_kept(found)

    def splits(self, level: int) -> bool:
        """Whether cells of a level have children."""
        return not self.on_grid and self.axes > 0 and level < _DEEPEST_LEVEL

    def cosine(self, level: int) -> float:
        """A lower bound of cos D, D = max over a cell of sum_a d_a |x_a|, d_a = (taps - 1) / 2."""
        if self.on_grid or self.axes == 0:
            return 1.0
        angles = [(self.taps[axis] - 1) * self._width(axis, level) for axis in range(self.axes)]
        twice = max(angles[:2]) + sum(angles[2:])
        return math.cos(math.pi * (twice / CYCLE)) - _COSINE_ERROR

    def widths(self) -> list[float]:
        """Half widths of level 0, in cycles."""
        return [self._width(axis, 0) / CYCLE if axis < self.axes else 0.0 for axis in range(3)]

    def _is_interval(self, axis: int) -> bool:
        return self.axes == 1 or axis == 2

    def _width(self, axis: int, level: int) -> int:
        # Level 0 has 2 D <= pi / 2 on one and two axes, 3 pi / 4 on three.
        least = (2 if self.axes == 1 else 4) * (self.taps[axis] - 1)
        count = 1 << (least - 1).bit_length()
        return (CYCLE // (2 * count if self._is_interval(axis) else count)) >> level

    def _is_kept(self, centres: Tensor) -> Tensor:
        """Of p and -p, one: the first axis on which they differ decides."""
        periods = sent(self.periods, centres.device)
        mirrored = (periods - centres) % periods
        order = (centres - mirrored).sign()
        weights = sent([4, 2, 1], centres.device)
        return (order * weights).sum(-1) <= 0


def cells_of(taps: Sequence[int], grid: Sequence[int]) -> Cells:
    """The cells of a shape of taps, on a grid unless its three sizes are 0."""
    on_grid = any(grid)
    several = [count > 1 for count in taps]
    periods = [
        (size if on_grid else CYCLE) if many else 1
        for size, many in zip(grid, several, strict=True)
    ]
    return Cells((taps[0], taps[1], taps[2]), (periods[0], periods[1], periods[2]), on_grid)

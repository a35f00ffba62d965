"""Cells cover half of the torus of frequencies, and their children what they cover."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipfast.ops._conv_cells import CYCLE, Cells, cells_of

SHAPES = [(2, 1, 1), (5, 1, 1), (3, 3, 1), (2, 7, 1), (2, 2, 2), (3, 2, 4)]


def covered(cells: Cells, centres: Tensor, points: Tensor, level: int) -> Tensor:
    """Whether D to some centre, or to a mirrored one, is at most what the level's cosine allows."""
    degrees = torch.tensor([(count - 1) / 2 for count in cells.taps], dtype=torch.float64)
    most = math.acos(max(cells.cosine(level), -1.0))
    turns = (points[:, None] - torch.cat([centres, -centres])).double() / CYCLE
    turns = turns - turns.round()
    distances = (2 * math.pi * turns.abs() * degrees).sum(-1)
    return (distances <= most).any(1)


@pytest.mark.parametrize("taps", SHAPES, ids=str)
def test_cells_cover_the_torus(taps: tuple[int, int, int]) -> None:
    cells = cells_of(taps, (0, 0, 0))
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(0, CYCLE, (100, 3), generator=generator)
    points[:, cells.axes :] = 0
    points = torch.cat([points, torch.zeros(1, 3, dtype=torch.long)])
    centres = cells.roots()
    for level in range(3):
        assert bool(covered(cells, centres, points, level).all())
        assert bool(((centres >= 0) & (centres < torch.tensor(cells.periods))).all())
        centres, parents = cells.children(centres, level)
        assert len(parents) == len(centres)
    # No more of them than half of the torus takes, and the few that are their own mirror images.
    area = 2 ** min(cells.axes, 2) * (2 if cells.axes == 3 else 1)
    assert len(centres) <= 1.3 * len(cells.roots()) * area**3


def test_cosines_are_lower_bounds() -> None:
    cells = cells_of((3, 3, 1), (0, 0, 0))
    # On level l, D = (3 - 1) / 2 times pi / 4 halved l times.
    for level in range(10):
        exact = math.cos(math.pi / 4 / 2**level)
        assert exact - 1e-13 < cells.cosine(level) < exact


def test_points_of_a_grid() -> None:
    """One of each mirrored pair, and no angle to lose."""
    cells = cells_of((3, 2, 1), (5, 4, 1))
    points = cells.roots()
    mirrored = torch.cat([points, -points]) % torch.tensor(cells.periods)
    assert len(mirrored.unique(dim=0)) == 20 and len(points) == 11
    assert cells.cosine(0) == 1.0 and not cells.splits(0)

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.analysis.searches import (
    ascended_lower_bound,
    effective_lower_bound,
    grid_norms,
    grid_points,
    pairwise_lower_bound,
)
from lipfast.errors import ArgumentError

ENDS = torch.tensor([[0.0, 0.0], [1.0, 0.0]])


def test_convex_combinations_find_the_steep_part_between_samples(bump: nn.Module) -> None:
    # w = .5 is the only weight in use that falls into (.4, .6).
    assert effective_lower_bound(bump, ENDS, ENDS, draws=50) == pytest.approx(3)
    assert effective_lower_bound(bump, ENDS[:1], ENDS[1:], draws=10) == 0
    inside = torch.tensor([[0.5, 0.0]])
    assert effective_lower_bound(bump, ENDS, inside, draws=5) == pytest.approx(3)


def test_pairs_average_over_the_segment(bump: nn.Module) -> None:
    assert pairwise_lower_bound(bump, ENDS) == pytest.approx(0.6)
    closer = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.0, 1.0]])
    assert pairwise_lower_bound(bump, closer) == pytest.approx(3)


def test_the_grid_sees_every_linear_region(bump: nn.Module) -> None:
    norms = grid_norms(bump, -1.0, 1.0, 21)
    assert norms.shape == (21, 21)
    assert norms.max() == pytest.approx(3)
    assert norms[15].tolist() == pytest.approx([3] * 21)  # x_1 = .5
    assert norms[0].max() == 0
    assert grid_points(-1, 1, 3)[5].tolist() == [0, 1]
    with pytest.raises(ArgumentError):
        grid_points(1, 0, 5)


def test_ascent_never_ends_below_the_samples() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh()).eval()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.zero_()
    x = torch.tensor([[0.5], [1.0]])
    at_samples = 2 * (1 - torch.tanh(torch.tensor(1.0)) ** 2).item()
    found = ascended_lower_bound(model, x, steps=60)
    assert at_samples < found <= 2 * (1 + 1e-6)
    assert found == pytest.approx(2, rel=1e-2)

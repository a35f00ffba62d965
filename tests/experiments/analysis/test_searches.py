from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.analysis.path_length import path_length
from experiments.analysis.perturbation import perturbed_estimates
from experiments.analysis.searches import (
    ascended_lower_bound,
    effective_lower_bound,
    grid_norms,
    grid_points,
    pairwise_lower_bound,
)
from lipfast.errors import ArgumentError


def _bump() -> nn.Sequential:
    """f(x) = 3 relu(x_1 - .4) - 3 relu(x_1 - .6): slope 3 between, 0 outside."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([-0.4, -0.6]))
        model[2].weight.copy_(torch.tensor([[3.0, -3.0]]))
        model[2].bias.zero_()
    return model.eval()


ENDS = torch.tensor([[0.0, 0.0], [1.0, 0.0]])


def test_convex_combinations_find_the_steep_part_between_samples() -> None:
    # w = .5 is the only weight in use that falls into (.4, .6).
    assert effective_lower_bound(_bump(), ENDS, ENDS, draws=50) == pytest.approx(3)
    assert effective_lower_bound(_bump(), ENDS[:1], ENDS[1:], draws=10) == 0
    inside = torch.tensor([[0.5, 0.0]])
    assert effective_lower_bound(_bump(), ENDS, inside, draws=5) == pytest.approx(3)


def test_pairs_average_over_the_segment() -> None:
    assert pairwise_lower_bound(_bump(), ENDS) == pytest.approx(0.6)
    closer = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.0, 1.0]])
    assert pairwise_lower_bound(_bump(), closer) == pytest.approx(3)


def test_the_grid_sees_every_linear_region() -> None:
    norms = grid_norms(_bump(), -1.0, 1.0, 21)
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


def test_perturbed_estimates_of_a_known_function() -> None:
    x = torch.tensor([[0.0, 0.0], [0.3, 1.0]])
    moved = torch.tensor([[0.0, 0.0], [0.5, 1.0]])
    found = perturbed_estimates(_bump(), x, moved)
    assert (found.clean, found.perturbed, found.mean) == pytest.approx((0, 3, 1.5))
    assert found.quotient == pytest.approx(0.3 / 0.2, rel=1e-5)
    assert found.radius == pytest.approx(0.2)
    assert perturbed_estimates(_bump(), moved, moved).ratio == 1
    assert torch.tensor(perturbed_estimates(_bump(), x, x).quotient).isnan()
    with pytest.raises(ArgumentError, match="differ"):
        perturbed_estimates(_bump(), x, x[:1])


def test_path_length_adds_up_the_moves() -> None:
    states = [
        {"w": torch.zeros(2), "b": torch.zeros(1), "steps": torch.tensor(0)},
        {"w": torch.tensor([2.0, 1.0]), "b": torch.tensor([2.0]), "steps": torch.tensor(5)},
        {"w": torch.tensor([2.0, 1.0]), "b": torch.tensor([-2.0]), "steps": torch.tensor(9)},
    ]
    assert path_length(states) == [0, 3, 7]
    assert path_length([]) == []
    with pytest.raises(ArgumentError, match="same parameters"):
        path_length([states[0], {"w": torch.zeros(3)}])

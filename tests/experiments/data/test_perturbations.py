from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from experiments.data.perturbations import convex_combinations, gaussian_perturbation, pgd
from lipfast.errors import ArgumentError


def test_convex_combinations_are_of_two_different_samples() -> None:
    x = torch.eye(5, dtype=torch.float64)
    mixed = convex_combinations(x, [0.1, 0.5], 40, seed=3)
    assert mixed.shape == (80, 5)
    torch.testing.assert_close(mixed.sum(1), torch.ones(80, dtype=torch.float64))
    assert torch.equal((mixed > 0).sum(1), torch.full((80,), 2))
    torch.testing.assert_close(mixed[:40].max(1).values, torch.full((40,), 0.9).double())
    assert torch.equal(mixed, convex_combinations(x, [0.1, 0.5], 40, seed=3))


@pytest.mark.parametrize("shape", [(6, 40), (6, 1, 7, 7)])
def test_noise_has_the_radius(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for radius in (0.0, 0.1, 30.0):
        moved = gaussian_perturbation(x, radius, seed=1) - x
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((6,), radius).double())


@pytest.mark.parametrize("norm", [2, math.inf])
def test_attacks_stay_in_the_ball_and_raise_the_loss(norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    model[0].eval()
    x, y = torch.rand(20, 8), torch.arange(20) % 4
    attacked = pgd(model, x, y, 0.3, norm=norm, clip=(0, 1))
    assert [module.training for module in model] == [False, True, True, True]
    assert model.training
    assert torch.linalg.vector_norm(attacked - x, norm, dim=1).max() <= 0.3 * (1 + 1e-5)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    model.eval()
    before, after = (functional.cross_entropy(model(z), y).item() for z in (x, attacked))
    assert after > before + 0.05
    assert torch.equal(pgd(model, x, y, 0.0), x)


def test_wrong_arguments() -> None:
    x, y = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="at least 2 samples"):
        convex_combinations(x, [0.5], 3)
    with pytest.raises(ArgumentError, match="weights are"):
        convex_combinations(torch.zeros(2, 3), [1.5], 3)
    with pytest.raises(ArgumentError, match="radius is nan"):
        gaussian_perturbation(x, math.nan)
    with pytest.raises(ArgumentError, match="norm is 1"):
        pgd(lambda z: z, x, y, 0.1, norm=1)
    with pytest.raises(ArgumentError, match="epsilon is -1"):
        pgd(lambda z: z, x, y, -1)

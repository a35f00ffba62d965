"""Upper bounds: certified, tight, and never overflowing silently."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lipfast.estimators.plan import Plan


def mlp(seed: int, *widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def product_of_singular_values(state_dict: dict[str, Tensor]) -> float:
    weights = [value.double() for value in state_dict.values() if value.dim() == 2]
    return math.prod(float(torch.linalg.matrix_norm(weight, 2)) for weight in weights)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [(4, 3), (40, 64, 10), (7, 30, 20, 5), (3, 1, 2)])
def test_certified_and_tight_on_random_networks(seed: int, widths: tuple[int, ...]) -> None:
    model = mlp(seed, *widths)
    plan = Plan.trace(model, torch.zeros(2, widths[0]))
    bound = plan.upper(model.state_dict(), rtol=1e-6 / len(widths))
    truth = product_of_singular_values(model.state_dict())
    assert bound.certified
    # The reference's own rounding is below 1e-13.
    assert bound.value >= truth * (1 - 1e-13)
    assert bound.value <= truth * (1 + 1e-6)
    assert bound.log_value == pytest.approx(math.log(truth), abs=2e-6)
    for layer in bound.layers:
        weight = model.state_dict()[f"{layer.name}.weight"].double()
        sigma = float(torch.linalg.matrix_norm(weight, 2))
        assert layer.lower <= sigma * (1 + 1e-13)
        assert sigma * (1 - 1e-13) <= layer.upper <= sigma * (1 + 1e-6)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_other_norms(norm: float) -> None:
    model = mlp(0, 5, 6, 4)
    plan = Plan.trace(model, torch.zeros(2, 5))
    bound = plan.upper(model.state_dict(), norm=norm)
    weights = [value.double() for value in model.state_dict().values() if value.dim() == 2]
    truth = math.prod(float(torch.linalg.matrix_norm(weight, norm)) for weight in weights)
    # The sweep is that of the product; the bound is the interval Jacobian's.
    assert bound.composition is not None
    assert truth * (1 - 1e-14) <= bound.composition.total.value <= truth * (1 + 1e-12)
    assert bound.value < truth
    published = plan.upper(model.state_dict(), norm=norm, simplify=False)
    assert truth * (1 - 1e-14) <= published.value <= truth * (1 + 1e-12)
    assert bound.norm == norm


def test_many_state_dicts_at_once_equal_one_by_one() -> None:
    model = mlp(0, 6, 8, 3)
    plan = Plan.trace(model, torch.zeros(2, 6))
    state_dicts = [mlp(seed, 6, 8, 3).state_dict() for seed in range(5)]
    together = plan.upper(state_dicts)
    assert len(together) == 5
    assert together == [plan.upper(entry) for entry in state_dicts]
    assert plan.upper([]) == []


def test_product_beyond_float64_has_a_finite_logarithm_and_a_reason() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(12)])
    plan = Plan.trace(model, torch.zeros(2, 3))
    weights = {name: torch.eye(3) * 1e30 for name in plan.parameters}
    bound = plan.upper(weights)
    assert bound.value == math.inf
    assert bound.log_value == pytest.approx(360 * math.log(10), rel=1e-6)
    assert bound.log_value >= 360 * math.log(10) * (1 - 1e-7)
    assert bound.certified
    assert "exceeds float64" in (bound.reason or "")
    assert "e+360" in repr(bound)
    lower = plan.lower(weights, torch.ones(2, 3))
    assert lower.jacobian.value == math.inf
    assert lower.value == 0.0
    assert lower.certified


def test_product_that_underflows_stays_above_zero() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(12)])
    plan = Plan.trace(model, torch.zeros(2, 2))
    bound = plan.upper({name: torch.eye(2) * 1e-30 for name in plan.parameters})
    assert 0.0 < bound.value < 1e-300
    assert bound.log_value == pytest.approx(-360 * math.log(10), rel=1e-6)


def test_zero_weights() -> None:
    model = mlp(0, 3, 4, 2)
    plan = Plan.trace(model, torch.zeros(2, 3))
    state_dict = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    result = plan.bounds(state_dict, torch.randn(3, 3))
    assert result.lower.value == 0.0
    assert 0.0 <= result.upper.value < 1e-100
    assert "lower" in str(result)


def test_state_dicts_with_gradients_and_views_are_left_alone() -> None:
    model = mlp(0, 3, 4, 2)
    plan = Plan.trace(model, torch.zeros(2, 3))
    weight = model[0].weight.detach().t().contiguous().t().requires_grad_()
    state_dict = dict(model.state_dict(), **{"0.weight": weight})
    assert plan.upper(state_dict) == plan.upper(model.state_dict())
    assert weight.grad is None
    assert weight.requires_grad


class Cancelled(nn.Module):
    """W = a b - c, of which only rounding is left."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        a, b = scale + scale * torch.rand(2, size, size, generator=generator, dtype=torch.float64)
        self.a, self.b, self.c = (nn.Parameter(value) for value in (a, b, a * b))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.a * self.b - self.c)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("scale", [1e-75, 1e-65, 1.0])
def test_errors_whose_squares_underflow_count(scale: float, norm: float) -> None:
    model = Cancelled(2, scale)
    bound = Plan.trace(model, torch.zeros(2, 2).double()).upper(model.state_dict(), norm=norm)
    entries = [
        [Fraction(a) * Fraction(b) - Fraction(c) for a, b, c in zip(*rows, strict=True)]
        for rows in zip(*(p.tolist() for p in (model.a, model.b, model.c)), strict=True)
    ]
    column = max(abs(entries[0][j]) + abs(entries[1][j]) for j in (0, 1))
    row = max(abs(left) + abs(right) for left, right in entries)
    # Norm 2 is at least that of a column.
    longest = max(entries[0][j] ** 2 + entries[1][j] ** 2 for j in (0, 1))
    assert bound.certified
    if norm == 2:
        assert 0 < longest <= Fraction(bound.value) ** 2
    else:
        assert 0 < (column if norm == 1 else row) <= Fraction(bound.value)


def test_a_network_whose_constant_is_known() -> None:
    """``I + d d^T`` twice, for a unit vector d of dyadic numbers: 2 along d, where ReLU is open."""
    d = torch.full((4,), 0.5)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    for layer in (model[0], model[2]):
        layer.weight.data.copy_(torch.eye(4) + torch.outer(d, d))
    plan = Plan.trace(model, torch.zeros(2, 4))
    upper = plan.upper(model.state_dict())
    lower = plan.lower(model.state_dict(), torch.stack([d, -d, 2 * d]))
    assert lower.certified
    assert 4.0 * (1 - 1e-6) <= lower.value <= 4.0 <= upper.value <= 4.0 * (1 + 3e-6)

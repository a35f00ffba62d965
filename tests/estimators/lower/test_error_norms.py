"""Errors carried as norms: they cover the truth, and deep networks keep certified lower bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.enclosure import enclose
from lipfast.estimators.lower.error_norms import (
    ErrorNormsLater,
    layer_norms,
    layer_norms_of_each,
    output_error_norms,
)
from lipfast.estimators.plan import Plan
from lipfast.plan.state import stack

NORMS = [1, 2, math.inf]


def deep(depth: int, width: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Layers of about unit gain, so that errors and not norms limit what can be proved."""
    torch.manual_seed(depth)
    model = nn.Sequential(nn.Linear(5, width), activation())
    for _ in range(depth):
        model.extend([nn.Linear(width, width), activation()])
    model.append(nn.Linear(width, 3))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.4 / math.sqrt(parameter.shape[1]))
    return model.double().requires_grad_(False)


def exact_relu_network(model: nn.Sequential, x: Tensor) -> list[Fraction]:
    values = [Fraction(value) for value in x.tolist()]
    for module in model:
        if isinstance(module, nn.ReLU):
            values = [max(value, Fraction(0)) for value in values]
            continue
        assert isinstance(module, nn.Linear)
        values = [
            sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(bias))
            for row, bias in zip(module.weight.tolist(), module.bias.tolist(), strict=True)
        ]
    return values


def test_the_output_in_real_arithmetic_is_within_the_error() -> None:
    model = deep(12, 8)
    plan = Plan.trace(model, torch.zeros(2, 5, dtype=torch.float64))
    tensors = plan.resolve(model.state_dict())
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, errors = output_error_norms(plan, tensors, layer_norms(plan, tensors), x[None])
    for point, computed, error in zip(x, outputs[0].tolist(), errors[0].tolist(), strict=True):
        truth = exact_relu_network(model, point)
        squares = [(Fraction(a) - b) ** 2 for a, b in zip(computed, truth, strict=True)]
        assert 0 < sum(squares) <= Fraction(error) ** 2


class Skipping(nn.Module):
    """Branches that meet, a normalisation, a constant output beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6).double(), nn.Linear(6, 6).double()
        self.norm = nn.LayerNorm(6).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return hidden + torch.relu(self.second(self.norm(hidden))), hidden.sum(1)


@pytest.mark.parametrize("make", [lambda: deep(6, 8), lambda: deep(3, 5, nn.GELU), Skipping])
def test_errors_of_many_networks_are_those_of_each(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    plan = Plan.trace(model, torch.zeros(2, 5, dtype=torch.float64))
    networks = [
        plan.resolve({key: value * scale for key, value in model.state_dict().items()})
        for scale in (1.0, 0.7, 1e200)
    ]
    points = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert ErrorNormsLater.takes(plan)
    later = ErrorNormsLater(plan, networks, points)
    errors = later.errors(layer_norms_of_each(plan, networks), later.numbers)
    for index, tensors in enumerate(networks):
        own = points[index : index + 1]
        outputs, known = output_error_norms(plan, tensors, layer_norms(plan, tensors), own)
        torch.testing.assert_close(later.outputs[index], outputs[0], equal_nan=True)
        torch.testing.assert_close(errors[index], known[0], rtol=1e-6, atol=0)


def test_products_of_activations_are_looked_at_one_by_one() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) * torch.tanh(x)

    plan = Plan.trace(Product(), torch.zeros(2, 5, dtype=torch.float64))
    assert not ErrorNormsLater.takes(plan)


def test_errors_of_deep_networks_are_smaller_than_elementwise_ones() -> None:
    model = deep(15, 60)
    plan = Plan.trace(model, torch.zeros(2, 5, dtype=torch.float64))
    tensors = plan.resolve(model.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, errors = output_error_norms(plan, tensors, layer_norms(plan, tensors), x[None])
    parameters = stack([tensors], plan.used_parameters, torch.float64)
    _, elementwise = enclose(plan, parameters, x[None])
    assert bool((errors < 1e-4 * elementwise.norm(dim=2)).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_deep_networks_have_certified_lower_bounds(
    activation: type[nn.Module], norm: float
) -> None:
    model = deep(13, 40, activation)
    x = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = lipfast.bounds(model, x, norm=norm)
    assert result.lower.certified
    assert 0.9 * result.lower.jacobian.value <= result.lower.value <= result.upper.value


def test_residual_networks_with_batch_norm_have_certified_lower_bounds() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.path = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.path(x)
            return y

    torch.manual_seed(0)
    blocks = [Block(6) for _ in range(12)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *blocks, nn.MaxPool2d(3, 2), *head).eval()
    result = lipfast.bounds(model, torch.randn(3, 3, 10, 10))
    assert 0.9 * result.lower.jacobian.value <= result.lower.value <= result.upper.value


def test_the_product_of_activations_spreads_its_errors() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.a(x)) * torch.tanh(self.b(x))

    torch.manual_seed(0)
    model = Gated().double()
    plan = Plan.trace(model, torch.zeros(2, 5, dtype=torch.float64))
    tensors = plan.resolve(model.state_dict())
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    _, errors = output_error_norms(plan, tensors, layer_norms(plan, tensors), x)
    parameters = stack([tensors], plan.used_parameters, torch.float64)
    _, elementwise = enclose(plan, parameters, x)
    assert bool((elementwise.norm(dim=2) <= errors).all())
    assert float(errors.max()) < 1e-13


def test_an_overflow_proves_nothing() -> None:
    model = deep(3, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e200)
    plan = Plan.trace(model, torch.zeros(2, 5, dtype=torch.float64))
    tensors = plan.resolve(model.state_dict())
    x = torch.ones(1, 2, 5, dtype=torch.float64)
    _, errors = output_error_norms(plan, tensors, layer_norms(plan, tensors), x)
    assert bool(errors.isinf().all())


def test_a_layer_norm_that_is_not_certified_proves_nothing() -> None:
    model = deep(3, 4)
    plan = Plan.trace(model, torch.zeros(2, 5, dtype=torch.float64))
    tensors = plan.resolve(model.state_dict())
    *before, last = layer_norms(plan, tensors)
    x = torch.ones(1, 2, 5, dtype=torch.float64)
    for layers, known in (
        ([*before, last], True),
        ([*before, replace(last, certified=False)], False),
    ):
        _, errors = output_error_norms(plan, tensors, layers, x)
        assert bool(errors.isfinite().all()) is known

"""Lower bounds from samples: statistics, many networks, bad samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.estimators.plan import Plan


def model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3), nn.LeakyReLU(0.01))


@pytest.fixture
def plan() -> Plan:
    return Plan.trace(model(0), torch.zeros(2, 4))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(25, 4, generator=torch.Generator().manual_seed(2))


def reference_norms(network: nn.Module, x: Tensor) -> Tensor:
    network = network.double()
    rows = [torch.autograd.functional.jacobian(network, sample) for sample in x.double()]
    return torch.linalg.matrix_norm(torch.stack(rows), 2)


def test_statistics_against_explicit_jacobians(plan: Plan, x: Tensor) -> None:
    lower = plan.lower(model(1).state_dict(), x, per_sample=True)
    norms = reference_norms(model(1), x)
    assert lower.sample == int(norms.argmax())
    assert lower.jacobian.value == pytest.approx(float(norms.max()), rel=1e-5)
    assert lower.mean == pytest.approx(float(norms.mean()), rel=1e-5)
    assert lower.rms == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-5)
    assert lower.samples == 25
    assert lower.per_sample is not None
    torch.testing.assert_close(lower.per_sample.double(), norms, rtol=1e-5, atol=1e-7)
    assert lower.points.shape == (2, 4)
    assert lower.points.dtype == torch.float64


def test_per_sample_values_only_on_request(plan: Plan, x: Tensor) -> None:
    assert plan.lower(model(1).state_dict(), x).per_sample is None


def test_many_state_dicts_at_once(plan: Plan, x: Tensor) -> None:
    state_dicts = [model(seed).state_dict() for seed in range(4)]
    together = plan.lower(state_dicts, x)
    for entry, lower in zip(state_dicts, together, strict=True):
        alone = plan.lower(entry, x)
        assert lower.sample == alone.sample
        assert lower.value == pytest.approx(alone.value, rel=1e-9)
        assert lower.mean == pytest.approx(alone.mean, rel=1e-6)
    assert plan.lower([], x) == []


def test_bounds_of_many_state_dicts_are_ordered(plan: Plan, x: Tensor) -> None:
    for result in plan.bounds([model(seed).state_dict() for seed in range(8)], x):
        assert result.lower.certified
        assert result.upper.certified
        assert 0 < result.lower.value <= result.upper.value


def test_networks_that_overflow_single_precision_are_done_again_in_double(x: Tensor) -> None:
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    plan = Plan.trace(network, x)
    small = {name: torch.ones(shape) for name, shape in plan.parameters.items()}
    large = {name: torch.full(shape, 1e25) for name, shape in plan.parameters.items()}
    first, second = plan.lower([small, large], x)
    assert second.jacobian.value == pytest.approx(first.jacobian.value * 1e50, rel=1e-5)
    assert second.value == pytest.approx(second.jacobian.value, rel=1e-5)


def test_half_precision_samples(plan: Plan, x: Tensor) -> None:
    lower = plan.lower(model(0).state_dict(), x.half())
    assert lower.value == pytest.approx(lower.jacobian.value, rel=1e-5)


def test_samples_are_not_written_to(plan: Plan, x: Tensor) -> None:
    x.requires_grad_()
    before = x.detach().clone()
    plan.lower(model(0).state_dict(), x)
    assert torch.equal(x.detach(), before)
    assert x.grad is None


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(3, 5), ArgumentError, r"\(3, 5\); expected \(samples, 4\)"),
        (torch.zeros(4), ArgumentError, r"\(4,\); expected \(samples, 4\)"),
        (torch.zeros(0, 4), ArgumentError, "no samples"),
        (torch.zeros(3, 4, dtype=torch.int32), ArgumentError, "torch.int32"),
        ([[0.0] * 4], ArgumentError, "must be a tensor"),
    ],
)
def test_bad_samples(plan: Plan, bad: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan.lower(model(0).state_dict(), bad)  # type: ignore[call-overload]


def test_samples_that_are_not_finite_are_named(plan: Plan, x: Tensor) -> None:
    x[7, 1] = math.nan
    x[9, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"2 of 25 samples.*first is sample 7"):
        plan.lower(model(0).state_dict(), x)

"""Quadratic constraints in norms 1 and inf on a domain: never below, and far below the product."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Ball, Box
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper.quadratic import rows as module
from lipfast.rules.registry import RULES, Call

QUADRATIC = "quadratic constraints"


def _network(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1]).to(dtype)


@pytest.mark.parametrize("norm", [1, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_jacobians_and_the_interval_jacobian(norm: float, dtype: torch.dtype) -> None:
    model = _network((8, 40, 40, 40, 5), dtype)
    generator = torch.Generator().manual_seed(1)
    x = 0.5 + 0.2 * (2 * torch.rand(200, 8, generator=generator) - 1)
    options = {"norm": norm, "domain": Box(0.3, 0.7)}
    reached = lipfast.lower_bound(model, x.to(dtype), **options)
    before = lipfast.upper_bound(model, x.to(dtype), **options)
    found = lipfast.upper_bound(model, x.to(dtype), method="quadratic", **options)
    assert found.certified
    assert found.method == QUADRATIC
    assert found.certificate is None
    assert reached.value <= found.value < 0.7 * before.value


@pytest.mark.parametrize("norm", [1, math.inf])
def test_of_a_small_ball_the_norm_of_the_jacobian(norm: float) -> None:
    """To what scales that are not quite right, and nearly infinite multipliers, cost."""
    model = _network((6, 20, 20, 4), torch.float64)
    x = torch.full((6,), 0.3, dtype=torch.float64)
    jacobian = torch.func.jacrev(model)(x).detach()
    truth = float(torch.linalg.matrix_norm(jacobian, norm))
    options = {"norm": norm, "domain": Ball(1e-6, x), "method": "quadratic"}
    found = lipfast.upper_bound(model, x[None], effort=3, **options)
    assert truth <= found.value <= 1.001 * truth


def test_scales_and_their_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one hidden layer, all of whose slopes are known: the sum is known exactly."""
    first = nn.Linear(3, 2).double()
    first.weight.data.copy_(torch.tensor([[1.0, 1e-3, 0.0], [3.0, -2e-3, 1e-9]]))
    first.bias.data.fill_(100.0)
    last = nn.Linear(2, 2).double()
    model = nn.Sequential(first, nn.ReLU(), last)
    x = torch.zeros(1, 3, dtype=torch.float64)
    options = {"norm": math.inf, "domain": Ball(1.0), "method": "quadratic", "effort": 1}
    truth = (last.weight.detach() @ first.weight.detach()).abs().sum(1).max().item()
    assert truth <= lipfast.upper_bound(model, x, **options).value
    monkeypatch.setattr(module, "_MOST_WORK", 1)
    bound = lipfast.upper_bound(model, x, **options)
    assert bound.value >= truth
    assert bound.method == "interval Jacobian"
    assert bound.reason is not None
    assert "too long" in bound.reason


@pytest.mark.parametrize("norm", [1, math.inf])
def test_bounds_hold_for_weights_of_all_sizes(norm: float) -> None:
    generator = torch.Generator().manual_seed(2)
    model = _network((3, 5, 4, 2), torch.float64)
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    x = torch.rand(100, 3, generator=generator, dtype=torch.float64)
    for _ in range(8):
        scales = 10.0 ** (12 * torch.rand(3, generator=generator).double() - 6)
        state = model.state_dict()
        for index, scale in enumerate(scales):
            state[f"{2 * index}.weight"] = state[f"{2 * index}.weight"] * scale
        bound = plan.upper(state, norm=norm, method="quadratic", domain=Box(0.0, 1.0), effort=1)
        y = torch.func.functional_call(model, state, (x,))
        moves = torch.linalg.vector_norm(y[:50] - y[50:], norm, dim=1)
        moved = torch.linalg.vector_norm(x[:50] - x[50:], norm, dim=1)
        assert bool((moves <= bound.value * moved * (1 + 1e-12)).all())


def test_an_op_behind_the_last_matrix_counts() -> None:
    model = nn.Sequential(*_network((4, 9, 3)), nn.LeakyReLU(-2.0))
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(3))
    both = lipfast.bounds(model, x, norm="inf", method="quadratic", domain=Box(0.0, 1.0))
    assert both.lower.value <= both.upper.value


def test_only_on_a_domain_and_only_of_chains() -> None:
    model = _network((4, 9, 3))
    with pytest.raises(ArgumentError, match="unless a domain is given"):
        lipfast.upper_bound(model, torch.zeros(1, 4), norm=1, method="quadratic")
    plan = Plan.trace(model, torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match="unless a domain is given"):
        plan.tracker(norm=1, method="quadratic")
    tracker = plan.tracker(norm=1, method="quadratic", domain=Ball(1.0))
    assert tracker.upper(model.state_dict()).certified

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).sum(1, keepdim=True) + x

    found = lipfast.upper_bound(
        Sum(), torch.zeros(1, 4), norm=1, method="quadratic", domain=Ball(1.0)
    )
    assert found.certified
    assert found.reason is not None
    assert "chains" in found.reason


@pytest.mark.parametrize("norm", [1, math.inf])
def test_says_that_numbers_leave_float64(norm: float) -> None:
    model = _network((3, 8, 8, 2), torch.float64)
    weights = {name: 1e150 * value for name, value in model.state_dict().items()}
    plan = lipfast.compile(model, torch.zeros(1, 3).double())
    found = plan.upper(weights, norm=norm, domain=Box(-1, 1), method="quadratic")
    assert math.isinf(found.value) and math.isfinite(found.log_value)
    assert found.reason is not None and "numbers leave float64" in found.reason


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_networks_of_which_one_has_no_slopes(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's rule that knows slopes of some parameters only: of the others, their bounds."""
    monkeypatch.setitem(RULES, "aten.prelu", RULES["aten.prelu"])
    error = RULES["aten.prelu"].error

    def slopes(call: Call) -> tuple[float, float] | None:
        return (0.0, 1.0) if float(call.tensor(call.node.args[1]).max()) < 0.9 else None

    lipfast.rule("aten.prelu", error=error, slopes=slopes)(lambda call: call.input)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 2))
    plan, first = lipfast.compile(model, torch.zeros(1, 3)), model.state_dict()
    second = {**first, "3.weight": torch.tensor([0.95])}
    options = {"norm": norm, "domain": Ball(0.01), "method": "quadratic", "effort": 1}
    alone = [plan.upper(own, **options) for own in (first, second)]
    assert alone[0].method == QUADRATIC
    if norm != 2:
        assert alone[1].reason is not None and "has no slopes" in alone[1].reason
    for order in ([0, 1], [1, 0]):
        found = plan.upper([(first, second)[index] for index in order], **options)
        for one, index in zip(found, order, strict=True):
            assert (one.method, one.reason) == (alone[index].method, alone[index].reason)
            assert one.value == pytest.approx(alone[index].value, rel=0.05)

"""What dense matrices would take is told before it is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lipfast
from lipfast.estimators.upper.quadratic.graph_problem import problem_of
from lipfast.estimators.upper.quadratic.graph_room import QuadraticBoundError, Room, StepSizes
from lipfast.plan.checked import resolve_all


def _stack(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    ).eval()


def test_what_does_not_fit_is_a_product_at_once_and_says_why() -> None:
    """A hundred seconds and 1.6 GB, if it were tried."""
    model = _stack(16)
    plan = lipfast.compile(model, torch.zeros(1, 3, 16, 16))
    found = plan.upper(model.state_dict(), method="quadratic", effort=1)
    assert found.method == "product of certified spectral norms" and found.certified
    assert "MiB" in str(found.reason) and "memory=1073741824" in str(found.reason)
    assert found.value == plan.upper(model.state_dict()).value


def test_every_effort_has_its_operations() -> None:
    model = _stack(4)
    plan = lipfast.compile(model, torch.zeros(1, 3, 8, 8))
    (parameters,) = resolve_all(plan, model.state_dict())
    with pytest.raises(QuadraticBoundError, match="operations, more than the 1e\\+06"):
        problem_of(plan, parameters, memory=1 << 30, operations=1e6, evaluations=10)
    assert len(problem_of(plan, parameters, memory=1 << 30, operations=1e12).steps) == 2


def test_all_that_lives_is_counted() -> None:
    room = Room(1000)
    room.hold([torch.zeros(100, dtype=torch.float64)] * 3)  # one tensor
    room.require("a matrix", 200)
    with pytest.raises(QuadraticBoundError, match="a matrix would take"):
        room.require("a matrix", 201)
    steps = Room(1 << 20, math.inf, 0)
    wide = StepSizes(64, 64, 64, 64)
    with pytest.raises(QuadraticBoundError, match="the quadratic constraints of relu"):
        for _ in range(100):
            steps.require_step("relu", wide)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_coefficients_that_are_weights_have_no_error(mode: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).eval()
    plan = lipfast.compile(model, torch.zeros(1, 2, 8))
    (parameters,) = resolve_all(plan, model.state_dict())
    read = problem_of(plan, parameters, memory=1 << 30).steps[0].read
    units = torch.eye(16, dtype=torch.float64).reshape(16, 2, 8)
    bias, first.bias = first.bias, None
    expected = first.double()(units).flatten(1).mT
    assert read.value is not None and bias is not None
    assert torch.equal(read.value, expected)
    assert (read.error is None) == (mode == "zeros")

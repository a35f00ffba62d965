"""Modules put together at random: right or refused by every call, and left as they were found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.norms import Norm
from tests.support.generated import (
    RANDOM,
    BatchStatistics,
    Generated,
    difference_jacobians,
    generate,
)

NORMS: tuple[Norm, ...] = (2, 1, math.inf)
FAST, ALL = range(40), range(40, 300)
# Of these there is no derivative of one sample.
WITHOUT_DERIVATIVE = (*RANDOM, BatchStatistics)


def bits(value: object) -> object:
    """What a value is made of, comparable by `==`."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (
            *(id(value), value.dtype, tuple(value.shape), value.requires_grad, bits(value.grad)),
            bytes(flat.tolist()),
        )
    if isinstance(value, dict):
        return [(key, bits(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def state_of(module: nn.Module) -> object:
    """Every attribute of every submodule, and the random generator."""
    attributes = [bits(vars(part)) for part in module.modules()]
    return attributes, torch.get_rng_state().tolist()


def answer(case: Generated, call: Callable[[nn.Module], Any]) -> Any:
    """What a call says, None where it refuses; the module is as it was."""
    before = state_of(case.module)
    try:
        return call(case.module)
    except lipfast.LipfastError as error:
        assert len(str(error)) > 20, case
        return None
    finally:
        assert state_of(case.module) == before, case


def check(seed: int) -> None:
    case = generate(seed)
    truth = None
    if case.harmful not in WITHOUT_DERIVATIVE:
        truth = difference_jacobians(case.module, case.x)
    for norm in NORMS:
        check_calls(case, norm, truth)
    check_other_calls(case, truth)


def check_calls(case: Generated, norm: Norm, truth: Tensor | None) -> None:
    """The norms and both bounds, each by itself and together."""
    x = case.x
    exact = None if truth is None else torch.linalg.matrix_norm(truth, norm)
    found = answer(case, lambda module: lipfast.jacobian_norms(module, x, norm=norm))
    check_norms(case, found, exact)
    upper = answer(case, lambda module: lipfast.upper_bound(module, x, norm=norm))
    lower = answer(case, lambda module: lipfast.lower_bound(module, x, norm=norm))
    check_bounds(case, lower, upper, exact)
    both = answer(case, lambda module: lipfast.bounds(module, x, norm=norm))
    if both is not None:
        assert both.upper.value == upper.value, case
        assert both.lower.value <= both.upper.value, case


def check_other_calls(case: Generated, truth: Tensor | None) -> None:
    """Calls that have no norm of their own, or of which one norm says enough."""
    x = case.x
    plan = answer(case, lambda module: lipfast.compile(module, x))
    if plan is not None:
        answer(case, lambda module: plan.bounds(module.state_dict(), x))
    exact = None if truth is None else torch.linalg.matrix_norm(truth, 2)
    differentiable = answer(
        case, lambda module: lipfast.jacobian_norms(module, x, create_graph=True).detach()
    )
    check_norms(case, differentiable, exact)
    answer(case, lambda module: lipfast.lower_bound(module, x, search="ascent"))
    gradient = answer(case, lambda module: lipfast.input_gradient_norms(Sum(module), x))
    if truth is not None:
        truth = truth.sum(1, keepdim=True)
    check_norms(case, gradient, None if truth is None else torch.linalg.matrix_norm(truth, 2))


class Sum(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.inner(x).sum(1)
        return total


def close(found: Tensor, exact: Tensor, case: Generated) -> None:
    error = (found.double() - exact).abs().max()
    assert float(error) <= 2e-3 * (0.05 + float(exact.max())), (str(case), found, exact)


def check_norms(case: Generated, found: Tensor | None, exact: Tensor | None) -> None:
    if found is None:
        assert case.harmful is not None, f"refused without need: {case}"
        return
    assert exact is not None, f"the Jacobian of what has none: {case}"
    close(found, exact, case)


def check_bounds(case: Generated, lower: Any, upper: Any, exact: Tensor | None) -> None:
    """Bounds are of the function, whatever autograd says of it."""
    if lower is not None and upper is not None:
        assert lower.value <= upper.value * (1 + 1e-5), (str(case), lower, upper)
        assert not (lower.certified and upper.certified) or lower.value <= upper.value, case
    if exact is None:
        assert upper is None, f"a bound of what has none: {case}"
        return
    largest = float(exact.max())
    if upper is not None:
        assert upper.value >= largest * (1 - 1e-6) - 1e-7, (str(case), upper, largest)
    if lower is not None and not lower.certified:
        assert lower.value <= largest * (1 + 2e-3) + 1e-4, (str(case), lower, largest)


@pytest.mark.parametrize("seed", FAST)
def test_right_or_refused_and_left_as_found(seed: int) -> None:
    check(seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", ALL)
def test_campaign(seed: int) -> None:
    check(seed)


def test_differences_are_the_derivative_of_one_sample() -> None:
    case = generate(0)
    module = copy.deepcopy(case.module).double().eval()
    linear = nn.Linear(4, 4).double()
    found = difference_jacobians(nn.Sequential(linear), case.x)
    torch.testing.assert_close(found[0], linear.weight.detach(), rtol=1e-8, atol=1e-9)
    assert difference_jacobians(module, case.x).shape == (len(case.x), 4, 4)

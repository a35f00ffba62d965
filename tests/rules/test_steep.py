"""Errors of exponentials, logarithms, roots, quotients, gates and orders are enclosed."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lipfast.estimators.domain import Box
from lipfast.estimators.enclosure import enclose
from lipfast.estimators.plan import Plan
from tests.support.explicit import NORMS, Function, check_enclosure, traced

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "square": torch.square,
    "log": lambda x: torch.log(1 + x * x),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: torch.sqrt(1 + x * x),
    "rsqrt": lambda x: torch.rsqrt(1 + x * x),
    "reciprocal": lambda x: 1 / (1 + x * x),
    "quotient": lambda x: x / (2 + torch.sin(x)),
    "glu": lambda x: functional.glu(torch.cat([x, 2 * x], 1), 1),
    "sort": lambda x: x.sort(1, descending=True)[0],
    "topk": lambda x: torch.tanh(x).topk(2, largest=False)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_enclosed(name: str) -> None:
    model = Function(FUNCTIONS[name])
    check_enclosure(traced(model, (4,)), model, (4,), 1e-12)


@pytest.mark.parametrize(
    ("function", "precise"),
    [
        (lambda x: 1 / (x * x), lambda x: 1 / x**2),
        (lambda x: x / (x * x), lambda x: 1 / x),
        (
            lambda x: torch.log(x * x) * 1.0 + torch.tanh(x),
            lambda x: mpmath.log(x**2) + mpmath.tanh(x),
        ),
        (lambda x: torch.rsqrt(x * x), lambda x: 1 / abs(x)),
    ],
)
def test_errors_near_a_pole(function: object, precise: Callable[[object], object]) -> None:
    """Also where the square of a number is denormal, or 0."""
    plan = traced(Function(function), (1,))
    for point in (1.0, 1e-8, -3e-150, 1e-161, 0.0):
        x = torch.full((1, 1, 1), point, dtype=torch.float64)
        value, error = (found.item() for found in enclose(plan, {}, x))
        if point == 0.0:
            assert error == float("inf")
        else:
            with mpmath.workdps(60):
                truth = precise(mpmath.mpf(point))
                assert abs(truth - mpmath.mpf(value)) <= mpmath.mpf(error)


def test_gated_units_on_a_box() -> None:
    plan = Plan.trace(Function(lambda x: functional.glu(x, 1)), torch.zeros(2, 6))
    assert "domain" in (plan.upper({}).reason or "")
    values = [plan.upper({}, norm=norm, domain=Box(-2, 2)).value for norm in NORMS]
    assert values == pytest.approx([1.0, (1 + 0.25) ** 0.5, 1.5])

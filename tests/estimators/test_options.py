"""One signature: the options that calls share, and those that have a meaning elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.lower.stream import _SEARCHES
from lipfast.estimators.options import HOMES

torch.manual_seed(0)
X = torch.randn(5, 3)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
PLAN = lipfast.compile(MODEL, X)
STATE = MODEL.state_dict()
FUNCTIONS: dict[str, Callable[..., object]] = {
    "bounds": lipfast.bounds,
    "lower_bound": lipfast.lower_bound,
    "upper_bound": lipfast.upper_bound,
    "jacobian_norms": lipfast.jacobian_norms,
    "input_gradient_norms": lipfast.input_gradient_norms,
    "Plan.bounds": lipfast.Plan.bounds,
    "Plan.lower": lipfast.Plan.lower,
    "Plan.upper": lipfast.Plan.upper,
    "Plan.tracker": lipfast.Plan.tracker,
}
CALLS: dict[str, Callable[..., object]] = {
    "bounds": lambda **options: lipfast.bounds(MODEL, X, **options),
    "lower_bound": lambda **options: lipfast.lower_bound(MODEL, X, **options),
    "upper_bound": lambda **options: lipfast.upper_bound(MODEL, X, **options),
    "jacobian_norms": lambda **options: lipfast.jacobian_norms(MODEL, X, **options),
    "Plan.bounds": lambda **options: PLAN.bounds(STATE, X, **options),
    "Plan.lower": lambda **options: PLAN.lower(STATE, X, **options),
    "Plan.upper": lambda **options: PLAN.upper(STATE, **options),
    "Plan.tracker": lambda **options: PLAN.tracker(**options).upper(STATE),
}


def named(call: str) -> set[str]:
    parameters = inspect.signature(FUNCTIONS[call]).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("call", CALLS)
def test_shared_options(call: str) -> None:
    assert {"norm", "domain", "memory", "progress"} <= named(call)
    take = CALLS[call]
    for norm in (1, 2, math.inf):
        take(norm=norm, domain=None, memory=1 << 20, progress=False)
    assert str(take(norm="inf")) == str(take(norm=math.inf))
    for options, message in (
        ({"norm": 3}, "1, 2 or inf"),
        ({"memory": 0}, "positive number of bytes"),
        ({"memory": math.inf}, "positive number of bytes"),
        ({"memory": 10**30}, "positive number of bytes"),
        ({"memory": True}, "positive number of bytes"),
        ({"progress": "yes"}, "progress must be True, False or None"),
        ({"domain": (0, 1)}, "domain"),
        ({"domain": lipfast.Box(torch.zeros(7), torch.ones(7))}, "domain has no|do not fit"),
    ):
        with pytest.raises(ArgumentError, match=message):
            take(**options)


@pytest.mark.parametrize("domain", [lipfast.Box(-3, 3), lipfast.Ball(9.0)])
@pytest.mark.parametrize("call", CALLS)
def test_domains(call: str, domain: lipfast.Box | lipfast.Ball) -> None:
    if call != "jacobian_norms":
        CALLS[call](domain=domain)
        return
    with pytest.raises(ArgumentError, match=r"no meaning for jacobian_norms.*lower_bound"):
        lipfast.jacobian_norms(MODEL, X, domain=domain)


@pytest.mark.parametrize("option", HOMES)
@pytest.mark.parametrize("call", CALLS)
def test_options_without_a_meaning_say_where_they_have_one(call: str, option: str) -> None:
    if option in named(call):
        return
    with pytest.raises(ArgumentError, match=rf"'{option}'.*option of") as raised:
        CALLS[call](**{option: 1})
    assert all(home in str(raised.value) for home in HOMES[option])


def test_homes_are_the_signatures() -> None:
    for option, homes in HOMES.items():
        if "search=" in homes[0]:
            takes = {
                f"lower_bound(search='{name}')"
                for name, method in _SEARCHES.items()
                if option in {field.name for field in dataclasses.fields(method) if field.init}
            }
        else:
            takes = {call for call in FUNCTIONS if option in named(call)}
            takes -= {"jacobian_norms"} if option == "domain" else set()
        assert set(homes) == takes
    options = set().union(*map(named, FUNCTIONS))
    options |= {
        f.name for method in _SEARCHES.values() for f in dataclasses.fields(method) if f.init
    }
    assert options - set(HOMES) == {"norm", "memory", "progress"}


@pytest.mark.parametrize("call", [call for call in CALLS if call != "lower_bound"])
def test_unknown_options(call: str) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nrom'"):
        CALLS[call](nrom=2)


def test_a_tracker_on_a_domain() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    plan = lipfast.compile(Square(), X)
    assert math.isinf(plan.tracker().upper({}).value)
    expected = plan.upper({}, domain=lipfast.Box(-1, 1))
    assert plan.tracker(domain=lipfast.Box(-1, 1)).upper({}) == expected


WRONG = (np.zeros((2, 4)), torch.zeros(2, 4), torch.zeros(0), None, "no", 2)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("call", "option"),
    [
        *(("jacobian_norms", "create_graph"), ("jacobian_norms", "details")),
        *(("lower_bound", "per_sample"), ("bounds", "per_sample"), ("Plan.lower", "per_sample")),
        *(("Plan.upper", "simplify"), ("jacobian_norms", "method"), ("lower_bound", "search")),
    ],
)
def test_flags_and_names_are_checked(call: str, option: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"{option} must be (True or False|one of)"):
        CALLS[call](**{option: value})


def test_flags_of_numpy_are_flags() -> None:
    assert lipfast.jacobian_norms(MODEL, X, details=np.bool_(True)).method
    with pytest.raises(ArgumentError, match="create_graph must be True or False, not ndarray"):
        lipfast.input_gradient_norms(MODEL, X, create_graph=np.ones(2))  # type: ignore[arg-type]

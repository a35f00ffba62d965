"""Rules written by users."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, UnsupportedOpError
from lipfast.estimators.plan import Plan
from lipfast.rules import RULES, Call, rule
from lipfast.rules.registry import lookup
from lipfast.rules.upward import Upward


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3.0 * x)


@pytest.fixture(autouse=True)
def _registry_restored() -> Iterator[None]:
    before = dict(RULES)
    RULES.pop("aten.sin", None)
    yield
    RULES.clear()
    RULES.update(before)


def test_rule_of_a_user_makes_an_op_known() -> None:
    with pytest.raises(UnsupportedOpError, match=r"aten\.sin"):
        Plan.trace(Sine(), torch.zeros(2, 3))

    @rule("aten.sin")
    def sine(call: Call) -> Upward:
        return call.input * 1.0

    plan = Plan.trace(Sine(), torch.zeros(2, 3))
    assert plan.upper({}).value == pytest.approx(3.0)
    lower = plan.lower({}, torch.zeros(2, 3))
    assert lower.value == pytest.approx(3.0)
    assert not lower.certified
    assert "aten.sin" in (lower.reason or "")


def test_rule_may_return_a_plain_number() -> None:
    rule("aten.sin")(lambda call: 7.0)
    assert Plan.trace(Sine(), torch.zeros(2, 3)).upper({}).value == 7.0


def test_rule_may_answer_unbounded() -> None:
    rule("aten.sin")(lambda call: call.unbounded("sines frighten me"))
    bound = Plan.trace(Sine(), torch.zeros(2, 3)).upper({})
    assert bound.value == math.inf
    assert "sines frighten me" in (bound.reason or "")


@pytest.mark.parametrize("name", ["sin", "aten.sin.default"])
def test_names_of_ops(name: str) -> None:
    with pytest.raises(ArgumentError, match="no overload"):
        rule(name)


def test_lookup_of_an_unknown_op() -> None:
    with pytest.raises(UnsupportedOpError, match=r"@lipfast\.rule\('aten\.foo'\)"):
        lookup("aten.foo")

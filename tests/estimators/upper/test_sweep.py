"""The sweep: steps are found once, rules are those of the call, explanations need no weights."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.estimators.upper.sweep import sweep_of
from lipfast.rules import registry
from lipfast.rules.registry import RULES, Call, rule
from lipfast.rules.upward import Upward
from tests.support.two_layers import MODELS, TwoLayers, bound


def traced(name: str) -> tuple[lipfast.Plan, dict[str, Tensor]]:
    model = TwoLayers((3.0, 4.0), MODELS[name])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return lipfast.compile(model, torch.zeros(1, 4)), state


def shown(upper: lipfast.UpperBound) -> list[object]:
    return [str(upper), str(upper.explain()), upper.log_shares, upper.sources]


def scaled_by_a_weight(call: Call) -> Upward:
    """Reads the state dict, as a user's rule may."""
    largest = float(call.parameters["a.weight"].abs().max())
    return (call.operands[0] + call.operands[1]) * largest


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("own", [True, False])
def test_explained_as_of_the_call(monkeypatch: pytest.MonkeyPatch, name: str, own: bool) -> None:
    if not own:
        for op in ("aten.add", "aten.sub", "aten.maximum"):
            monkeypatch.setitem(RULES, op, replace(RULES[op], bound=scaled_by_a_weight))
    plan, state = traced(name)
    expected = shown(plan.upper(state))
    later = plan.upper(state)
    copies = [pickle.loads(pickle.dumps(later)), copy.copy(later), copy.deepcopy(later)]
    held = [weakref.ref(value) for value in state.values()]
    for value in state.values():
        value.mul_(7.0)
    del state, value
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    assert [shown(upper) for upper in (later, *copies)] == [expected] * 4


def test_contributions_are_found_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, state = traced("nested")
    calls = []
    rule = RULES["aten.add"]

    def counted(call: Call) -> object:
        calls.append(call.node.name)
        return rule.bound(call)

    # As if it were one of lipfast's own.
    entry = replace(rule, bound=counted)
    for table in (RULES, registry._SHIPPED):
        monkeypatch.setitem(table, "aten.add", entry)
    upper = plan.upper(state)
    assert len(calls) == 2
    upper.explain()
    assert len(calls) == 6
    str(upper)
    assert len(calls) == 6


def test_a_rule_that_is_registered_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, state = traced("maximum")
    before = plan.upper(state)
    assert sweep_of(plan, plan.folded) is sweep_of(plan, plan.folded)
    with monkeypatch.context() as patched:
        rule = replace(RULES["aten.maximum"], bound=scaled_by_a_weight)
        patched.setitem(RULES, "aten.maximum", rule)
        assert plan.upper(state).value == pytest.approx(3.0 * (3.0 + 12.0), rel=1e-5)
        patched.delitem(RULES, "aten.maximum")
        with pytest.raises(lipfast.LipfastError, match=r"aten\.maximum"):
            plan.upper(state)
    assert plan.upper(state) == before


def test_a_rule_in_lipfasts_clothes_is_asked_at_once() -> None:
    """functools.wraps copies the module's name, not where a function was written."""
    before = RULES["aten.add"]
    factor = [2.0]

    @functools.wraps(before.bound)
    def mine(call: Call) -> Upward:
        return cast(Upward, before.bound(call)) * factor[0]

    rule("aten.add")(mine)
    try:
        upper = bound((3.0, 4.0), lambda x, a, b: a(x) + b(x))
    finally:
        RULES["aten.add"] = before
    factor[0] = 0.0
    assert sum(share or 0.0 for share in upper.log_shares) < 1.0
    assert len(upper.explain().steps) > 0

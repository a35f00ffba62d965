"""What is proved given rules of users says so, wherever it is shown or kept."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lipfast
from lipfast.errors import UnsupportedOpError
from lipfast.estimators.plan import Plan
from lipfast.estimators.results import BoundOrderError
from lipfast.rules import RULES, Call, rule
from lipfast.rules.registry import Arguments
from lipfast.rules.upward import Upward
from lipfast.scoring import export_scores, read_scores, score
from lipfast.scoring.show import overview_text, store_overview
from lipfast.scoring.single import bound_checkpoint

GIVEN = "certified given the rule of aten.asinh"


def slope_of_one(call: Call) -> Upward:
    return call.input * 1.0


def wide_error(arguments: Arguments, errors: object, output: Tensor) -> Tensor:
    incoming = errors[0]  # type: ignore[index]
    return 1e-12 * (1.0 + output.abs()) + incoming


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(self.linear(x))


@pytest.fixture(autouse=True)
def _registry_restored() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.fixture
def asinh() -> None:
    rule("aten.asinh", error=wide_error)(slope_of_one)


X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.usefixtures("asinh")
def test_bounds_say_what_they_are_given() -> None:
    found = lipfast.bounds(Net(), X)
    assert found.given == found.lower.given == found.upper.given == ("aten.asinh",)
    assert found.lower.certified
    assert found.upper.certified
    for text in (str(found), repr(found)):
        assert text.count(GIVEN) == 2
    assert GIVEN in found.upper._repr_html_()
    assert GIVEN in found.lower._summary()
    explained = repr(found.explain())
    assert GIVEN in explained
    assert "a user's rule" in explained
    assert [step.given for step in found.explain().steps] == [False, True]


def test_bounds_by_rules_of_lipfast_are_given_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    found = lipfast.bounds(model, X)
    assert found.given == ()
    assert "given" not in str(found) + repr(found) + repr(found.explain())
    assert "given" not in lipfast.compile(model, X).to_json()


def test_a_rule_in_the_place_of_lipfasts_own_is_a_users() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    plan = lipfast.compile(model, X)
    state = model.state_dict()
    before = plan.upper(state)
    rule("aten.tanh")(lambda call: call.input * 5.0)
    after = plan.upper(state)
    assert after.given == ("aten.tanh",)
    assert after.value == pytest.approx(5 * before.value)
    assert plan.lower(state, X).given == ()  # without errors nothing is certified


@pytest.mark.usefixtures("asinh")
def test_a_plan_keeps_it(tmp_path: Path) -> None:
    plan = lipfast.compile(Net(), X)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint
    for kept in (loaded, pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert kept.given == ("aten.asinh",)
        assert kept.upper(Net().state_dict()).given == ("aten.asinh",)
    assert "given the rule of aten.asinh" in repr(plan)


def test_a_plan_that_was_traced_by_a_users_rule_says_so_ever_after() -> None:
    own = RULES["aten.tanh"]
    rule("aten.tanh")(slope_of_one)
    plan = lipfast.compile(nn.Tanh(), X)
    RULES["aten.tanh"] = own
    assert plan.upper({}).given == ("aten.tanh",)


@pytest.mark.usefixtures("asinh")
def test_the_store_says_it(tmp_path: Path) -> None:
    rule("aten.tanh")(slope_of_one)
    archive = tmp_path / "runs"
    archive.mkdir()
    save_file(Net().state_dict(), archive / "a.safetensors")
    summary = score(archive, arch=Net(), data=X, out=tmp_path / "scores")
    assert summary.given == {"aten.asinh": 1}
    assert "1 bounded given the rule of aten.asinh" in str(summary)
    table = read_scores(tmp_path / "scores").to_pydict()
    assert (table["given"], table["upper_certified"]) == (["aten.asinh"], [True])
    overview = store_overview(tmp_path / "scores")
    assert overview["given"] == {"aten.asinh": 1}
    assert "1 bounded given the rule of aten.asinh" in overview_text(overview)
    export_scores(tmp_path / "scores", tmp_path / "scores.jsonl")
    assert json.loads((tmp_path / "scores.jsonl").read_text())["given"] == "aten.asinh"
    _, found = bound_checkpoint(str(archive / "a.safetensors"), arch=Net(), data=X)
    assert GIVEN in str(found)


def test_a_wrong_rule_is_named_where_bounds_contradict() -> None:
    rule("aten.asinh", error=wide_error)(lambda call: call.input * 0.01)
    with pytest.raises(BoundOrderError, match=r"given the rule of aten\.asinh, which cannot be"):
        lipfast.bounds(Net(), X)


def test_what_a_plan_derived_under_another_rule_is_derived_anew() -> None:
    """Two layers merge where the op between them is folded; then it is no such op any more."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    plan = lipfast.compile(model, X)
    state = model.state_dict()
    before = plan.upper(state)
    assert len(before.layers) == 1
    own = RULES["aten.batch_norm"]
    rule("aten.batch_norm")(lambda call: call.input * 7.0)
    after = plan.upper(state)
    assert len(after.layers) == 2
    assert after.value > 3 * before.value
    assert after.given == ("aten.batch_norm",)
    RULES["aten.batch_norm"] = own
    assert plan.upper(state) == before


def test_a_chain_is_of_the_rules_of_now() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = lipfast.compile(model, X)
    assert plan.chain is not None
    rule("aten.relu")(slope_of_one)
    assert plan.chain is None
    assert plan.lower(model.state_dict(), X).jacobian.value > 0


@pytest.mark.parametrize("op", ["aten.linear", "aten.relu"])
def test_a_plan_whose_rule_is_gone_is_refused_by_name(op: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    plan = lipfast.compile(model, X)
    plan.bounds(model.state_dict(), X)
    del RULES[op]
    for call in (plan.upper, lambda state: plan.lower(state, X), plan.check):
        with pytest.raises(UnsupportedOpError, match=op):
            call(model.state_dict())


@pytest.mark.usefixtures("asinh")
def test_infinite_and_unproved_bounds_say_it_too() -> None:
    rule("aten.asinh")(lambda call: call.unbounded("too steep"))
    upper = lipfast.upper_bound(Net(), X)
    assert upper.value == math.inf
    assert upper.given == ("aten.asinh",)


@pytest.mark.parametrize("op", ["aten.cat", "aten.maximum", "aten.minimum"])
def test_a_users_rule_counts_where_pairs_would_be_sorted(op: str) -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x[:, :2], x[:, 2:]
            return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)

    plan = Plan.trace(Sorted(), torch.zeros(2, 4))
    assert plan.upper({}).value == 1.0
    rule(op)(lambda call: call.input * 5.0)
    bound = plan.upper({})
    assert bound.value >= 5.0
    assert [step.op for step in bound.composition.operations if step.given] == [op]


@pytest.mark.parametrize("op", ["aten.pad", "aten.conv1d"])
def test_a_users_rule_counts_where_padding_would_be_joined(op: str) -> None:
    model = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    plan = Plan.trace(model, torch.zeros(2, 1, 5))
    assert "circular" in plan.layers[0].kind
    rule(op)(lambda call: call.input * 1e3)
    bound = plan.upper(model.state_dict())
    assert [step.op for step in bound.composition.operations if step.given] == [op]


@pytest.mark.parametrize("op", ["aten.maximum", "aten.abs"])
def test_a_rule_that_only_the_graph_for_bounds_uses_is_named(op: str) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x[:, :2], x[:, 2:]
            return (first + second + (first - second).abs()) / 2

    plan = Plan.trace(Largest(), torch.zeros(2, 4))
    assert plan.upper({}).given == ()
    rule(op)(slope_of_one)
    for bound in (plan.upper({}), lipfast.upper_bound(Largest(), torch.zeros(2, 4))):
        assert bound.given == (op,)
        assert [step.op for step in bound.composition.operations if step.given] == [op]

"""Rules written by users."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, StateDictError, TraceError, UnsupportedOpError
from lipfast.estimators.domain import Box
from lipfast.estimators.plan import Plan
from lipfast.ops.chain_stages import Activation
from lipfast.plan import canonical, computed
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
    assert "aten.sin: give its @lipfast.rule an `error`" in (lower.reason or "")


def test_rule_may_return_a_plain_number() -> None:
    rule("aten.sin")(lambda call: 7.0)
    assert Plan.trace(Sine(), torch.zeros(2, 3)).upper({}).value == 7.0


def test_rule_may_answer_unbounded() -> None:
    rule("aten.sin")(lambda call: call.unbounded("sines frighten me"))
    bound = Plan.trace(Sine(), torch.zeros(2, 3)).upper({})
    assert bound.value == math.inf
    assert "sines frighten me" in (bound.reason or "")


@pytest.mark.parametrize("name", ["sin", "aten.sin.default", "aten.", ".sin"])
def test_names_of_ops(name: str) -> None:
    with pytest.raises(ArgumentError, match="no overload"):
        rule(name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": "samples"},
        {"parameter_errors": "often"},
        {"affine": 3},
        {"dimensions": 1},
        {"dimensions": {"dim": 1}},
    ],
    ids=str,
)
def test_arguments_that_are_none_of_the_words(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} must be"):
        rule("aten.sin", **wrong)  # type: ignore[arg-type]


def test_lookup_of_an_unknown_op() -> None:
    with pytest.raises(UnsupportedOpError, match=r"@lipfast\.rule\('aten\.foo'\)"):
        lookup("aten.foo")


class Running(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


@pytest.mark.parametrize(("dimensions", "seen"), [({1: "dim"}, 2), (None, -1)])
def test_dimensions_are_counted_from_the_front(
    dimensions: dict[int, str] | None, seen: int
) -> None:
    found = []

    @rule("aten.cumsum", dimensions=dimensions)
    def cumsum(call: Call) -> Upward:
        found.append(call.node.args[1])
        return call.input * float(call.operand_shapes[0][-1])

    bound = Plan.trace(Running(), torch.zeros(2, 4, 3)).upper({}, norm=math.inf)
    assert bound.value == 3.0
    assert set(found) == {seen}


def test_a_later_registration_replaces_an_earlier_one_but_for_what_arguments_mean() -> None:
    before = RULES["aten.sum"]
    assert before.error is not None
    rule("aten.sum")(lambda call: call.input * 7.0)
    after = RULES["aten.sum"]
    assert after.dimensions == before.dimensions
    assert (after.error, after.leading) == (None, False)
    plan = Plan.trace(SumOfLast(), torch.zeros(2, 4, 3))
    assert plan.graph.nodes[-1].args[1] == (2,)
    assert plan.upper({}).value == 7.0


class SumOfLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


class InWindows(nn.Module):
    """A function of windows: samples and windows share the first dimension."""

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 3)  # (B, 8, 3) -> (4 B, 2, 3)
        return torch.asinh(windows).reshape(-1, 8, 3)


@pytest.mark.parametrize("leading", [True, False])
def test_a_pointwise_rule_holds_inside_windows(leading: bool) -> None:
    rule("aten.asinh", leading=leading)(lambda call: call.input * 1.0)
    if not leading:
        with pytest.raises(TraceError, match=r"asinh.*may mix"):
            Plan.trace(InWindows(), torch.zeros(2, 8, 3))
        return
    plan = Plan.trace(InWindows(), torch.zeros(2, 8, 3))
    assert plan.graph.node("asinh").shape == (4, 2, 3)
    assert plan.upper({}).value == 1.0


class Powers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("exponent", torch.tensor([1, 3, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ldexp(x, self.exponent)


@pytest.mark.parametrize("integers", [True, False])
def test_a_rule_says_whether_a_parameter_may_be_of_integers(integers: bool) -> None:
    @rule("aten.ldexp", integers=integers)
    def ldexp(call: Call) -> Upward:
        return call.input * 2.0 ** float(call.tensor(call.node.args[1]).max())

    model = Powers()
    plan = Plan.trace(model, torch.zeros(2, 3))
    if integers:
        assert plan.upper(model.state_dict()).value == 8.0
    else:
        with pytest.raises(StateDictError, match="floating dtype"):
            plan.upper(model.state_dict())


def test_a_rule_of_an_op_with_several_results_is_of_the_first() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values, _ = x.sort(-1)
            return values

    rule("aten.sort", dimensions={1: "dim"})(lambda call: call.input)
    assert Plan.trace(Sorted(), torch.zeros(2, 3)).upper({}).value == 1.0


def test_a_user_says_how_a_chain_holds_an_activation() -> None:
    rule("aten.selu", stage=lambda node, shape: [Activation("elu", (1.0,))])(
        lambda call: call.input
    )
    plan = Plan.trace(nn.Sequential(nn.Linear(3, 2), nn.SELU()), torch.zeros(2, 3))
    assert plan.chain is not None
    assert plan.chain.stages[-1] == Activation("elu", (1.0,))


def test_tables_of_ops_hold_none_that_has_a_rule() -> None:
    """What is known of an op stands in its rule's entry alone."""
    tables = [
        value
        for module in (canonical, computed)
        for value in vars(module).values()
        if isinstance(value, (frozenset, dict)) and value
        if all(isinstance(entry, str) and entry.startswith("aten.") for entry in value)
    ]
    assert len(tables) > 10
    for table in tables:
        assert set(table) & set(RULES) == set()


class PlainSine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def zero_error(arguments: object, errors: object, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


@pytest.mark.parametrize("answer", [ZeroDivisionError, "rubbish", 3, object()])
@pytest.mark.parametrize(
    "part",
    ["bound", "error", "evaluate", "stage", "layer", "breakpoints", "magnitude", "supports"],
)
def test_what_a_part_of_a_rule_does_wrong_names_it(part: str, answer: object) -> None:
    """Of the kinds that a part may answer, some are right."""
    right = {("bound", 3), ("supports", "rubbish")}

    def wrong(*arguments: object) -> object:
        if answer is ZeroDivisionError:
            raise ZeroDivisionError("division by zero")
        return answer

    parts = {"error": zero_error, "product": lambda node: True, part: wrong}
    bound = parts.pop("bound", lambda call: call.input * 3.0)
    rule("aten.sin", **parts)(bound)  # type: ignore[arg-type]
    x, model = torch.ones(2, 3), nn.Sequential(nn.Linear(3, 3), PlainSine())

    def bounds() -> None:
        plan = Plan.trace(model, x)
        plan.bounds(model.state_dict(), x, domain=Box(-1, 1))

    if (part, answer) == ("bound", 3):
        bounds()
    elif (part, answer) in right:
        with pytest.raises(UnsupportedOpError, match=r"aten\.sin \(rubbish\)"):
            bounds()
    else:
        with pytest.raises(TraceError, match=rf"aten\.sin in module.*the '{part}' of its rule"):
            bounds()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"training": "x"}, "training"),
        ({"dtype_eps": -1}, "dtype_eps"),
        ({"fills": (1, -1)}, "fills"),
        ({"training": True}, "training"),
        ({"stage": 3}, "stage"),
        ({"leading": 1}, "leading"),
        ({"casts": "no"}, "casts"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(wrong: dict[str, object], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be"):
        rule("aten.sin", **wrong)  # type: ignore[arg-type]


def test_a_rule_is_a_function_of_ops() -> None:
    with pytest.raises(ArgumentError, match="name of an op"):
        rule()
    with pytest.raises(ArgumentError, match="must be a function of a Call"):
        rule("aten.sin")(3)  # type: ignore[arg-type]


def test_channels_are_for_ops_like_batch_norm() -> None:
    rule("aten.sin", affine="channels")(lambda call: call.input)
    model = nn.Sequential(nn.Linear(3, 3), PlainSine())
    plan = Plan.trace(model, torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match=r"aten\.sin in module.*arguments of aten\.batch_norm"):
        plan.upper(model.state_dict())


class MaximumOfAll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.max(x)


def test_what_mixes_samples_is_refused_by_a_rule_that_replaces_another() -> None:
    rule("aten.max")(lambda call: call.input)
    with pytest.raises(UnsupportedOpError, match=r"aten\.max \(over all dimensions"):
        Plan.trace(MaximumOfAll(), torch.zeros(2, 3))
    rule("aten.max", supports=lambda node: None)(lambda call: call.input)
    with pytest.raises(TraceError, match=r"aten\.max"):
        Plan.trace(MaximumOfAll(), torch.zeros(2, 3))

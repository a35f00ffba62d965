"""The plan as an object: saved, compared, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, TraceError, UnsupportedOpError
from lipfast.estimators.plan import Plan


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor([0.1, 1 / 3, 3.0, -2.0]), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.clamp(self.linear(x.flatten(1)), max=float("inf"))
        return {"scaled": hidden * self.scale, "hidden": hidden}


@pytest.fixture
def plan() -> Plan:
    return Plan.trace(Scaled(), torch.zeros(2, 2, 3))


def test_save_and_load_round_trip(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.layers == plan.layers
    (first,), (second,) = plan.constants.values(), loaded.constants.values()
    assert torch.equal(first.tensor(), second.tensor())
    text = path.read_text()
    assert "Infinity" not in text
    assert json.loads(text)["lipfast_plan"] == 1


def test_loaded_plan_gives_the_same_bounds(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    torch.manual_seed(0)
    state_dict = Scaled().state_dict()
    x = torch.randn(3, 2, 3)
    first = plan.bounds(state_dict, x)
    second = Plan.load(path).bounds(state_dict, x)
    assert first == second


def test_fingerprint_depends_on_the_architecture_only() -> None:
    example = torch.zeros(2, 3)

    def fingerprint(*layers: nn.Module) -> str:
        return Plan.trace(nn.Sequential(*layers), example).fingerprint

    reference = fingerprint(nn.Linear(3, 4), nn.LeakyReLU(0.1))
    assert fingerprint(nn.Linear(3, 4), nn.LeakyReLU(0.1)) == reference
    assert fingerprint(nn.Linear(3, 4), nn.LeakyReLU(0.2)) != reference
    assert fingerprint(nn.Linear(3, 5), nn.LeakyReLU(0.1)) != reference
    assert fingerprint(nn.Linear(3, 4, bias=False), nn.LeakyReLU(0.1)) != reference


def test_repr_shows_shapes_and_nodes(plan: Plan) -> None:
    text = repr(plan)
    assert text.startswith("Plan(2x3 -> 4, 4, 1 layers, 28 parameters")
    assert "aten.linear(" in text
    assert "linear.weight" in text


def test_plans_are_hashable(plan: Plan) -> None:
    assert {plan: 1}[plan] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not a lipfast plan"),
        ('{"lipfast_plan": 99}', "schema version 99"),
        ('{"lipfast_plan": 1}', "damaged plan"),
    ],
)
def test_unreadable_plans(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(TraceError, match=message):
        Plan.load(path)


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read"):
        Plan.load(tmp_path / "none.json")


def test_plan_with_an_op_that_has_no_rule_here(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(path.read_text().replace("aten.clamp", "aten.unheard_of"))
    with pytest.raises(UnsupportedOpError, match=r"aten\.unheard_of"):
        Plan.load(path)


@pytest.mark.parametrize("wrong", [None, 3])
def test_no_state_dict_at_all(wrong):
    plan = Plan.trace(nn.Linear(3, 2), torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="expected a state dict or a list of them, not"):
        plan.upper(wrong)


@pytest.mark.parametrize("path", [None, 1, torch.zeros(2, 3), ["plan.json"]])
def test_what_is_no_path_is_refused(plan: Plan, path: object) -> None:
    for call in (Plan.load, plan.save):
        with pytest.raises(ArgumentError, match=r"path must be a str or an os\.PathLike"):
            call(path)  # type: ignore[operator]


def test_a_tensor_is_no_list_of_state_dicts(plan: Plan) -> None:
    for given in (torch.tensor(1.0), torch.zeros(2, 3)):
        with pytest.raises(ArgumentError, match="not Tensor"):
            plan.upper(given)  # type: ignore[call-overload]

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError, StateDictError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 80), nn.ReLU())


@pytest.fixture
def plan() -> lipfast.Plan:
    return lipfast.compile(model(), torch.zeros(2, 60))


def run(steps: int, change: float, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """State dicts of a run: each differs from the one before by a relative change."""
    weights = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model().state_dict().items()
    }
    states = [weights]
    for _ in range(steps - 1):
        states.append(
            {
                name: value + change * torch.randn(value.shape, generator=generator)
                for name, value in states[-1].items()
            }
        )
    return states


def passes(bound: lipfast.UpperBound) -> int:
    return sum(layer.passes for layer in bound.layers)


def true_norms(state: dict[str, Tensor]) -> list[float]:
    return [
        float(torch.linalg.svdvals(state[name].double())[0]) for name in ("0.weight", "2.weight")
    ]


@pytest.mark.parametrize("change", [0.0, 1e-3, 1e-2, 1.0])
def test_brackets_hold_the_truth_along_a_run(
    plan: lipfast.Plan, change: float, generator: torch.Generator
) -> None:
    tracker = plan.tracker()
    for state in run(5, change, generator):
        bound, cold = tracker.upper(state), plan.upper(state)
        assert bound.certified
        for layer, other, truth in zip(bound.layers, cold.layers, true_norms(state), strict=True):
            assert layer.lower <= truth * (1 + 1e-14)
            assert layer.upper >= truth * (1 - 1e-14)
            assert layer.upper - layer.lower <= 1e-6 * layer.upper
            # Warm and cold values lie within each other's brackets.
            assert layer.lower <= other.upper and other.lower <= layer.upper
    assert set(tracker.vectors) == {"0.weight", "2.weight"}


def test_fewer_passes_when_little_changes(plan: lipfast.Plan, generator: torch.Generator) -> None:
    tracker = plan.tracker()
    states = run(4, 1e-3, generator)
    cold = [passes(plan.upper(state)) for state in states]
    warm = [passes(tracker.upper(state)) for state in states]
    assert warm[0] == cold[0]
    assert sum(warm[1:]) < 0.5 * sum(cold[1:])
    tracker.reset()
    assert passes(tracker.upper(states[0])) == cold[0]


def test_consecutive_checkpoints_in_one_call(
    plan: lipfast.Plan, generator: torch.Generator
) -> None:
    states = run(5, 1e-3, generator)
    together, alone = plan.tracker(), plan.tracker()
    first = together.upper(states[:2])
    assert [bound.value for bound in first] == [bound.value for bound in plan.upper(states[:2])]
    alone.upper(states[1])
    later = together.upper(states[2:])
    assert later[0].value == alone.upper(states[2]).value
    assert together.upper(states[4]).certified


def test_any_start_gives_a_certified_bound(plan: lipfast.Plan, generator: torch.Generator) -> None:
    """Vectors of the smallest singular value: the worst start there is."""
    state = run(1, 0.0, generator)[0]
    smallest = {
        name: torch.linalg.svd(state[name].double())[2][-1] for name in ("0.weight", "2.weight")
    }
    for start in (smallest, {"0.weight": smallest["0.weight"]}):
        bound = plan.upper(state, start=start)
        assert bound.certified
        for layer, truth in zip(bound.layers, true_norms(state), strict=True):
            assert layer.lower <= truth * (1 + 1e-14)
            assert truth * (1 - 1e-14) <= layer.upper <= truth * (1 + 1e-6)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_other_norms_carry_nothing(
    plan: lipfast.Plan, norm: float, generator: torch.Generator
) -> None:
    tracker = plan.tracker(norm=norm)
    for state in run(2, 1e-2, generator):
        assert tracker.upper(state).value == plan.upper(state, norm=norm).value
    assert tracker.vectors == {}


def test_errors_leave_the_vectors(plan: lipfast.Plan, generator: torch.Generator) -> None:
    tracker = plan.tracker()
    state = run(1, 0.0, generator)[0]
    tracker.upper(state)
    before = tracker.vectors
    with pytest.raises(StateDictError):
        tracker.upper({"0.weight": state["0.weight"]})
    with pytest.raises(NonFiniteError):
        tracker.upper({**state, "0.weight": state["0.weight"] * math.nan})
    with pytest.raises(ArgumentError, match="no state dicts"):
        tracker.upper([])
    assert tracker.vectors is before


def test_bad_starts(plan: lipfast.Plan, generator: torch.Generator) -> None:
    state = run(1, 0.0, generator)[0]
    with pytest.raises(ArgumentError, match="2 mappings for 1 state dicts"):
        plan.upper([state], start=[{}, {}])
    with pytest.raises(ArgumentError, match="'bias' is not the weight of a layer"):
        plan.upper(state, start={"bias": torch.ones(60)})
    with pytest.raises(ArgumentError, match="expected 60 values"):
        plan.upper(state, start={"0.weight": torch.ones(61)})
    with pytest.raises(ArgumentError, match="norm"):
        plan.tracker(norm=3)

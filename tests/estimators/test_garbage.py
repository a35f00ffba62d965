"""What a call made of state dicts goes with its results: no cycle of references keeps weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.batch import batch_bounds
from lipfast.plan.checked import checked_all

MODELS = {
    "chain": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "folded": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "computed": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))),
    "convolutional": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten()),
}
CALLS = {
    "upper": lambda plan, state_dicts, x: plan.upper(state_dicts),
    "upper, inf": lambda plan, state_dicts, x: plan.upper(state_dicts, norm=float("inf")),
    "lower": lambda plan, state_dicts, x: plan.lower(state_dicts, x),
    "bounds": lambda plan, state_dicts, x: plan.bounds(state_dicts, x),
    "checked": lambda plan, state_dicts, x: checked_all(plan, state_dicts),
    "batch": lambda plan, state_dicts, x: batch_bounds(
        plan, checked_all(plan, state_dicts), x, norm=2, seed=0, start=None, memory=1 << 28
    ),
}


@pytest.fixture
def collected_by_count_only() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", MODELS)
def test_weights_go_with_the_results(collected_by_count_only: None, model: str, call: str) -> None:
    torch.manual_seed(0)
    shape = (1, 6) if model == "convolutional" else (6,)
    network, x = MODELS[model]().eval(), torch.randn(5, *shape)
    plan = lipfast.compile(network, x[:2])

    def copies() -> list[dict[str, Tensor]]:
        return [{name: value.clone() for name, value in network.state_dict().items()}] * 2

    CALLS[call](plan, copies(), x)  # what a plan makes at its first call is the plan's
    state_dicts = copies()
    known = [weakref.ref(value) for value in state_dicts[0].values()]
    CALLS[call](plan, state_dicts, x)
    del state_dicts
    assert [one() for one in known] == [None] * len(known)

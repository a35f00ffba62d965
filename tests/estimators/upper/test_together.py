"""Bounds of many networks at once are those of each alone, bit by bit."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.upper.spectral_product import upper_bounds_together
from lipfast.rules import registry
from lipfast.rules.registry import RULES, Call
from tests.support.networks import convolutional, randomised
from tests.support.two_layers import MODELS, TwoLayers


class Normed(nn.Module):
    """Rules that read weights, beside some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return torch.cat([h + self.last(h) * self.scale, h], 1)


CASES = {
    **{
        name: (lambda make=make: (TwoLayers((3.0, 4.0), make), (4,)))
        for name, make in MODELS.items()
    },
    "reads weights": lambda: (Normed(), (6,)),
    "folded and pooled": lambda: (convolutional(), (2, 12, 12)),
    "weight norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (6,)),
    "merged": lambda: (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (6,)),
    "unbounded": lambda: (MultipliedByItself(), (4,)),
    "the input as an output": lambda: (WithItsInput(), (4,)),
}


class WithItsInput(nn.Module):
    """The same number for all networks, ahead of one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x, self.linear(x), x.relu()


class MultipliedByItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.flip(1)


def varied(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """State dicts; of the last, products leave the range of float64."""
    found = []
    for index in range(count):
        factor = 1.0 + 0.3 * index if index < count - 1 else 1e200
        state = {name: value.detach().double() for name, value in model.state_dict().items()}
        found.append({name: value * factor for name, value in state.items()})
    return found


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_as_alone(name: str, norm: float) -> None:
    torch.manual_seed(0)
    model, shape = CASES[name]()
    model = randomised(model).double()
    plan = lipfast.compile(model, torch.zeros(2, *shape, dtype=torch.float64))
    state_dicts = varied(model, 6)
    for state_dict, found in zip(state_dicts, plan.upper(state_dicts, norm=norm), strict=True):
        alone = plan.upper(state_dict, norm=norm)
        assert found == alone
        assert pickle.loads(pickle.dumps(found)) == alone
        for composition in (found.composition, pickle.loads(pickle.dumps(found.composition))):
            assert composition.total == alone.composition.total
            assert dict(composition.constants) == dict(alone.composition.constants)
            meetings = {key: dict(value) for key, value in composition.contributions.items()}
            assert meetings == {k: dict(v) for k, v in alone.composition.contributions.items()}
        assert str(found.explain()) == str(alone.explain())


def test_rules_are_asked_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    plan = lipfast.compile(model, torch.zeros(2, 6))
    calls = []
    rule = RULES["aten.linear"]

    def counted(call: Call) -> object:
        calls.append(call.node.name)
        return rule.bound(call)

    # As if it were one of lipfast's own.
    entry = replace(rule, bound=counted)
    for table in (RULES, registry._SHIPPED):
        monkeypatch.setitem(table, "aten.linear", entry)
    upper_bounds_together(plan, varied(model, 50))
    assert len(calls) == 2


def test_of_none_and_of_a_few() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    plan = lipfast.compile(model, torch.zeros(2, 6))
    assert plan.upper([]) == []
    for count in (1, 2, 3, 4, 5):
        found = upper_bounds_together(plan, varied(model, count))
        assert len(found) == len(found.starts) == len(found.values) == count
        assert [found.of(i).value for i in range(count)] == found.values
        assert [
            float(found.brackets(i)[0].upper[found.brackets(i)[1], 0]) for i in range(count)
        ] == [found.of(i).layers[0].upper for i in range(count)]
        assert found.starts[-1]["0.weight"].shape == (6,)
    with pytest.raises(IndexError):
        found.starts[5]

"""The expression of a bound: its structure, and the tree that it prints."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.upper.explanation import Explanation, Factor, Join
from tests.support.two_layers import TwoLayers, bound


def test_a_chain_is_a_product() -> None:
    found = bound((3.0, 5.0), lambda x, a, b: b(torch.sigmoid(a(x)))).explain()
    assert [step.kind for step in found.steps] == ["linear", "sigmoid", "linear"]
    factors = [math.exp(step.log_factor) for step in found.steps]
    assert factors == pytest.approx([3.0, 0.25, 5.0], rel=1e-5)
    assert [step.layer for step in found.steps if isinstance(step, Factor)] == [0, None, 1]
    assert math.exp(found.steps[-1].log_value) == pytest.approx(3.75, rel=1e-5)


def test_the_larger_branch_dominates() -> None:
    for scale, dominant in ((3.0, 1), (0.5, 0)):
        found = bound((scale, 2.0), lambda x, a, b: b(x + a(x))).explain()
        join, last = found.steps
        assert isinstance(join, Join) and isinstance(last, Factor)
        assert [len(branch.steps) for branch in join.branches] == [0, 1]
        assert join.branches.index(join.dominant) == dominant
        assert [branch.share for branch in join.branches] == pytest.approx(
            [1 / (1 + scale), scale / (1 + scale)], rel=1e-5
        )
        assert math.exp(join.log_factor) == pytest.approx(1 + scale, rel=1e-5)
        lines = str(found).splitlines()
        marked = [line for line in lines if "dominates" in line]
        assert len(marked) == 1 and ("identity" in marked[0]) is (dominant == 0)


def test_joins_inside_branches() -> None:
    found = bound((3.0, 4.0), lambda x, a, b: x + a(x + b(x))).explain()
    (outer,) = found.steps
    assert isinstance(outer, Join)
    inner, layer = outer.branches[1].steps
    assert isinstance(inner, Join) and isinstance(layer, Factor)
    assert math.exp(outer.log_value) == pytest.approx(16.0, rel=1e-5)
    kinds = [type(step).__name__ for step in found.walk()]
    assert kinds == ["Factor", "Join", "Factor", "Join"]


class Dense(nn.Module):
    """Every layer reads all features before it: as many paths as there are subsets."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * (i + 1), 2) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def test_dense_connections_do_not_grow_exponentially() -> None:
    upper = lipfast.upper_bound(Dense(14), torch.zeros(1, 2))
    found = upper.explain()
    joins = [step for step in found.walk() if isinstance(step, Join)]
    assert len(joins) == 14
    assert len(str(found).splitlines()) < 400
    assert "as above" in str(found)


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 2 * y, y


def test_several_inputs_and_outputs() -> None:
    upper = lipfast.compile(Two(), (torch.zeros(1, 3), torch.zeros(1, 3))).upper({})
    found = upper.explain()
    (join,) = found.steps
    assert isinstance(join, Join) and join.kind == "outputs"
    assert math.exp(join.log_value) == pytest.approx(upper.value)


def test_lines_fit_and_infinity_shows() -> None:
    model = TwoLayers((3.0, 4.0), lambda x, a, b: a(x) * b(x))
    for _ in range(12):
        model = nn.ModuleDict({"a_rather_long_name_of_a_module": model})  # type: ignore[assignment]
        model.forward = next(iter(model.values())).forward  # type: ignore[method-assign]
    found = lipfast.upper_bound(model, torch.zeros(1, 4)).explain()
    lines = str(found).splitlines()
    assert max(len(line) for line in lines[1:]) <= 100
    assert "inf" in lines[2]


def test_without_a_composition() -> None:
    alone = lipfast.UpperBound(1.0, 0.0, "upper", 2, "by hand", True)
    with pytest.raises(ArgumentError, match="no composition"):
        alone.explain()
    assert alone.log_shares == ()
    assert str(Explanation((), "nothing")) == "nothing"

"""The public calls on whole models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, TraceError
from lipfast.estimators.calls import bounds, compile, lower_bound, upper_bound  # noqa: A004


class ResidualNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.stem(x.flatten(1)))
        return {"logits": self.head(hidden + self.block(hidden))}


@pytest.fixture
def data() -> Tensor:
    return torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_residual_network(data: Tensor, norm: float) -> None:
    model = ResidualNetwork()
    result = bounds(model, data, norm=norm)
    assert result.lower.certified
    assert result.upper.certified
    assert result.lower.value >= result.lower.jacobian.value * (1 - 1e-6)
    assert [layer.name for layer in result.layers] == ["stem", "block.0", "block.3", "head"]
    stem, first, second, head = (layer.upper for layer in result.layers)
    expected = stem * (1 + first * 1.128904145185155 * second) * head
    assert result.upper.composition.total.value == pytest.approx(expected, rel=1e-12)
    if norm == 2:
        assert result.upper.value == result.upper.composition.total.value
    else:  # the interval Jacobian
        assert result.lower.value <= result.upper.value < expected
    assert model.training


def test_the_parts_agree(data: Tensor) -> None:
    model = ResidualNetwork()
    result = bounds(model, data)
    assert upper_bound(model, data[:1]) == result.upper
    assert lower_bound(model, data) == result.lower
    plan = compile(model, data[:3])
    assert plan.bounds(model.state_dict(), data) == result


def test_wrapped_models_give_the_same_bounds(data: Tensor) -> None:
    reference = bounds(ResidualNetwork(), data)
    assert bounds(nn.DataParallel(ResidualNetwork()), data) == reference
    assert bounds(torch.compile(ResidualNetwork()), data) == reference


def test_plan_of_an_exported_program(data: Tensor, tmp_path: Path) -> None:
    model = ResidualNetwork().eval()
    program = torch.export.export(model, (data,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    result = compile(path).bounds(model.state_dict(), data)
    assert result == bounds(model, data)


def test_one_sample_is_enough(data: Tensor) -> None:
    assert bounds(ResidualNetwork(), data[:1]).lower.samples == 1


def test_bad_arguments(data: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"lipfast\.compile"):
        bounds("model.pt2", data)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no samples"):
        bounds(ResidualNetwork(), data[:0])
    with pytest.raises(ArgumentError, match="1, 2 or inf"):
        bounds(ResidualNetwork(), data, norm=3)
    with pytest.raises(TraceError, match="cannot be evaluated on samples of shape"):
        bounds(nn.Linear(7, 2), data)

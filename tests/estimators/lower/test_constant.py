"""Functions that do not depend on their inputs: the constant is 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lipfast
from lipfast.estimators.lower import points
from lipfast.scoring import read_scores, score


class Constant(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.weight, x)


X = torch.linspace(-1, 1, 12).reshape(4, 3)
CONSTANT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "parameter": lambda w, x: w.expand(x.shape[0], 2),
    "repeated": lambda w, x: w[None].repeat(x.shape[0], 1),
    "zeros": lambda w, x: torch.zeros(x.shape[0], 3),
    "like the input": lambda w, x: x.new_zeros(x.shape[0], 3),
    "range": lambda w, x: torch.arange(3.0).expand(x.shape[0], 3),
    "two": lambda w, x: (w.expand(x.shape[0], 2), torch.zeros(x.shape[0], 1)),
    "product with zero": lambda w, x: 0.0 * x,
}


@pytest.mark.parametrize("norm", [1, 2, "inf"])
@pytest.mark.parametrize("name", CONSTANT)
def test_bounds_are_zero_and_certified(name: str, norm: Any) -> None:
    model = Constant(CONSTANT[name])
    found = lipfast.bounds(model, X, norm=norm)
    assert (found.lower.value, found.upper.value, found.lower.jacobian.value) == (0, 0, 0)
    assert found.lower.certified
    assert found.upper.certified
    for options in ({}, {"create_graph": True}):
        assert lipfast.jacobian_norms(model, X, norm=norm, **options).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("search", "options"),
    [
        ("convex", {"draws": 8}),
        ("neighbourhood", {"draws": 2, "radius": 0.1}),
        ("ascent", {"steps": 2}),
        ("pairs", {}),
    ],
)
def test_searches_find_nothing(search: Any, options: dict[str, Any]) -> None:
    model = Constant(CONSTANT["parameter"])
    found = lipfast.lower_bound(model, X, search=search, **options)
    assert found.search is not None
    assert (found.value, found.search.estimate.value, found.certified) == (0, 0, True)


def test_a_large_jacobian_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "LARGEST_JACOBIAN", 1)
    assert lipfast.lower_bound(Constant(CONSTANT["parameter"]), X).value == 0


def test_one_output_of_several_may_be_constant() -> None:
    model = Constant(lambda w, x: (w.expand(x.shape[0], 2), 3.0 * x))
    assert lipfast.lower_bound(model, X).value == pytest.approx(3)


def test_a_constant_network_is_scored(tmp_path: Path) -> None:
    model = Constant(CONSTANT["parameter"])
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert score(tmp_path, arch=model, data=X, out=tmp_path / "scores").failed == 0
    table = read_scores(tmp_path / "scores").to_pydict()
    assert (table["lower"], table["upper"]) == ([0.0], [0.0])


class Waves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3.0 * x)


@pytest.mark.parametrize("norm", [1, 2, "inf"])
def test_a_sample_may_be_one_number(norm: Any) -> None:
    """Of shape (B,): no dimension stands after the samples."""
    x = torch.linspace(-1, 1, 5)
    slopes = (3.0 * torch.cos(3.0 * x)).abs()
    assert lipfast.jacobian_norms(Waves(), x, norm=norm).tolist() == pytest.approx(slopes.tolist())
    found = lipfast.bounds(Waves(), x, norm=norm)
    assert 2.99 < found.lower.value <= 3 <= found.upper.value
    searches: list[tuple[Any, dict[str, Any]]] = [
        ("ascent", {"steps": 2}),
        ("pairs", {}),
        ("convex", {"draws": 8}),
        ("neighbourhood", {"draws": 2, "radius": 0.1}),
    ]
    for search, options in searches:
        lower = lipfast.lower_bound(Waves(), x, norm=norm, search=search, **options)
        assert 2.99 < lower.value <= 3

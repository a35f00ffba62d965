"""What a call cannot take is refused in lipfast's own words, or taken as what it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lipfast
from lipfast.errors import ArgumentError, LipfastError

X = torch.linspace(-1, 1, 12).reshape(4, 3)
MODEL = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
CALLS: dict[str, Callable[..., Any]] = {
    "jacobian_norms": lipfast.jacobian_norms,
    "lower_bound": lipfast.lower_bound,
    "upper_bound": lipfast.upper_bound,
    "bounds": lipfast.bounds,
    "compile": lipfast.compile,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.sin, "wrap it, as in class Model"),
        (lambda x: x, "wrap it, as in class Model"),
        (functools.partial(torch.add, 1), "wrap it, as in class Model"),
        (MODEL.forward, "wrap it, as in class Model"),
        (nn.Linear, "the class Linear: give an instance"),
        (MODEL.state_dict(), "give its architecture to lipfast.compile"),
        (lipfast.compile(MODEL, X), r"not Plan: its own methods take state dicts"),
        (X, "spectral_norms takes matrices"),
        (X.numpy(), "not ndarray"),
        (None, "not NoneType"),
        ([MODEL], "not list"),
    ],
)
def test_what_is_no_model(call: str, model: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"model must be an nn.Module.*{message}"):
        CALLS[call](model, X)


class Sized(Dataset[Any]):
    """Entries of the sizes that are given; a failure where there is none."""

    def __init__(self, *sizes: int | None) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        size = self.sizes[index]
        if size is None:
            raise KeyError("no such file")
        return torch.ones(size)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3), torch.ones(3)], layout=torch.jagged)


DATA: list[tuple[Any, str]] = [
    (torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]), "nested tensor"),
    (jagged(), "nested tensor"),
    (X.to_sparse(), "sparse_coo.*to_dense"),
    (X.to_sparse_csr(), "sparse_csr.*to_dense"),
    (X.to(torch.complex64), "complex numbers are not supported.*view_as_real"),
    (X.to(torch.float8_e4m3fn), r"float8.*\.float\(\)"),
    (X.long(), "token ids"),
    (Sized(3, 2), "cannot be read.*collate_fn"),
    (Sized(3, None), "cannot be read.*no such file"),
    (DataLoader(Sized(3, 2), batch_size=2), "cannot be read.*collate_fn"),
    ({"x": X}, "not dict"),
    (3, "not int"),
    ((row for row in X), "not generator"),
    (list(X), "takes 2 positional arguments but 5"),
    (list(torch.ones(4)), r"shape \(\)"),
]


@pytest.mark.parametrize("call", ["jacobian_norms", "lower_bound", "upper_bound", "bounds"])
@pytest.mark.parametrize("case", range(len(DATA)))
def test_what_are_no_samples(call: str, case: int) -> None:
    data, message = DATA[case]
    with pytest.raises(LipfastError, match=message):
        CALLS[call](MODEL, data)


@pytest.mark.parametrize("case", range(10))
def test_what_are_no_samples_of_a_plan(case: int) -> None:
    data, message = DATA[case]
    with pytest.raises(ArgumentError, match=message):
        lipfast.compile(MODEL, X).lower(MODEL.state_dict(), data)


def test_rows_in_a_list_are_told_from_inputs() -> None:
    with pytest.raises(ArgumentError, match=r"as these 4 do \(torch.stack"):
        lipfast.jacobian_norms(MODEL, list(X))


class Weighs(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale[:, None]


def test_an_input_may_be_one_number_per_sample() -> None:
    norms = lipfast.jacobian_norms(Weighs(), (X, torch.ones(4)))
    size = X.double().square().sum(1)
    assert norms.tolist() == pytest.approx((1 + size).sqrt().tolist(), rel=1e-5)


@pytest.mark.parametrize("seed", [1.5, "a", None, -1, 2**64, True, torch.tensor(3)], ids=str)
@pytest.mark.parametrize("search", ["data", "convex", "ascent", "pairs", "neighbourhood"])
def test_seeds(search: Any, seed: Any) -> None:
    with pytest.raises(ArgumentError, match="seed must be"):
        lipfast.lower_bound(MODEL, X, search=search, seed=seed)


@pytest.mark.parametrize("search", ["convex", "ascent", "pairs"])
def test_numbers_of_numpy_are_numbers(search: Any) -> None:
    expected = lipfast.lower_bound(MODEL, X, search=search, seed=3)
    assert lipfast.lower_bound(MODEL, X, search=search, seed=np.int64(3)) == expected  # type: ignore[arg-type]
    plan, state = lipfast.compile(MODEL, X), MODEL.state_dict()
    loose = plan.upper(state, rtol=np.float32(1e-3), seed=np.int64(1))  # type: ignore[arg-type]
    assert loose == plan.upper(state, rtol=float(np.float32(1e-3)), seed=1)


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        ("convex", {"draws": 10**30}, "draws must be at most"),
        ("convex", {"draws": 2.0}, "draws must be a positive integer"),
        ("ascent", {"step": 10**400}, "step must be a positive number"),
        ("ascent", {"step": True}, "step must be a positive number"),
        ("neighbourhood", {"radius": math.nan}, "radius must be a positive number"),
    ],
)
def test_options_of_searches(search: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lipfast.lower_bound(MODEL, X, search=search, **options)


@pytest.mark.parametrize("start", [1, "a", [1], True, X], ids=str)
def test_starts(start: Any) -> None:
    with pytest.raises(ArgumentError, match="start must be a mapping"):
        lipfast.compile(MODEL, X).upper(MODEL.state_dict(), start=start)


@pytest.mark.parametrize("norm", [True, False, np.True_, None, [2], "2", 3, math.nan], ids=str)
def test_norms(norm: Any) -> None:
    for call in (lipfast.jacobian_norms, lipfast.upper_bound):
        with pytest.raises(ArgumentError, match="norm must be 1, 2 or inf"):
            call(MODEL, X, norm=norm)


class Tokens(nn.Module):
    """Casts what it is given to indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x.long())
        return found


@pytest.mark.parametrize("call", ["jacobian_norms", "lower_bound", "upper_bound"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_token_ids_that_are_cast_inside(call: str, create_graph: bool) -> None:
    options = {"create_graph": True} if create_graph and call == "jacobian_norms" else {}
    message = "no rule for aten.to" if call == "upper_bound" else "cast to integers"
    with pytest.raises(LipfastError, match=message):
        CALLS[call](Tokens(), torch.tensor([[4.0, 1.0], [2.0, 0.0]]), **options)


class Scales(nn.Module):
    """Linear with a weight of another dtype or layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def test_weights_that_torch_stores_in_eight_bits() -> None:
    weight = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    model = Scales(weight.to(torch.float8_e4m3fn))
    found = lipfast.bounds(model, X)
    assert 3.99999 < found.lower.value <= 4 <= found.upper.value < 4.0001
    assert lipfast.jacobian_norms(model, X).tolist() == pytest.approx([4.0] * 4)


def test_nested_weights_are_refused() -> None:
    model = Scales(torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]))
    with pytest.raises(LipfastError, match=r"weight.*nested"):
        lipfast.jacobian_norms(model, X)


class Gamma(nn.Module):
    """Has no derivative by its first argument in torch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.gammainc(x + 3.0, torch.ones_like(x))


@pytest.mark.parametrize("method", ["rows", "lanczos", "auto"])
def test_what_torch_cannot_differentiate(method: Any) -> None:
    with pytest.raises(LipfastError, match="igamma"):
        lipfast.jacobian_norms(Gamma(), X, method=method)


@pytest.mark.parametrize("function", [nn.Linear, X, None, "model"], ids=str)
def test_what_is_no_function(function: Any) -> None:
    with pytest.raises(ArgumentError, match="function must be callable"):
        lipfast.input_gradient_norms(function, X)

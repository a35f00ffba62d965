"""Tensors of a trace are taken out of a model's caches, wherever those are."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import lipfast
from lipfast.errors import LipfastError, TraceError
from lipfast.plan.export import exported

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
STORE: dict[Any, Any] = {}
SEEN: deque[Any] = deque(maxlen=8)
VARIABLE: Tensor | None = None
PLACE = types.SimpleNamespace(last=None)


@functools.cache
def _unbounded(n: int) -> Tensor:
    return torch.arange(n) * 0.5


@functools.lru_cache(maxsize=2)
def _bounded(n: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    return torch.arange(n) * 0.5, (torch.arange(n) * 2.0,)


class Table:
    """A helper outside of the module."""

    @functools.cached_property
    def values(self) -> Tensor:
        return torch.arange(4) * 0.5


TABLE = [Table()]


class Cached(nn.Module):
    """A layer and a table, from a cache."""

    store: ClassVar[dict[Any, Any]] = {}
    seen: ClassVar[list[Any]] = []
    whole: ClassVar[Tensor | None] = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 4), kind

    @functools.cache  # noqa: B019
    def table(self, n: int) -> Tensor:
        return torch.arange(n) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        global VARIABLE
        n, y = x.shape[1], self.layer(x)
        if self.kind == "method":
            return y + self.table(n)
        if self.kind == "function":
            return y + _unbounded(n)
        if self.kind == "tuples":
            return y + _bounded(n)[1][0]
        if self.kind == "helper":
            return y + TABLE[0].values
        if self.kind in ("class", "file"):
            store = self.store if self.kind == "class" else STORE
            if n not in store:
                store[n] = (torch.arange(4) * 0.5,)
            return y + store[n][0]
        if self.kind == "variable":
            if VARIABLE is None:
                VARIABLE = torch.arange(4) * 0.5
            return y + VARIABLE
        if self.kind == "attribute":
            if Cached.whole is None:
                Cached.whole = torch.arange(4) * 0.5
            return y + Cached.whole
        if self.kind == "inputs":
            SEEN.append(x)
        if self.kind == "list":
            self.seen.append((y, self.layer.weight))
        if self.kind == "last":
            PLACE.last = y
        return y


KINDS = ("method", "function", "tuples", "helper", "class", "file", "variable", "attribute")
WRITTEN = ("inputs", "list", "last")


def held_tensors() -> list[Tensor]:
    """What the caches hold."""
    found = [_unbounded(4), *_bounded(4), TABLE[0].values, *SEEN, PLACE.last]
    found += [VARIABLE, Cached.whole, *Cached.store.values(), *STORE.values(), *Cached.seen]
    leaves = torch.utils._pytree.tree_leaves(found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.fixture(autouse=True)
def empty() -> None:
    for cache in (_unbounded, _bounded, Cached.table):
        cache.cache_clear()
    for container in (STORE, SEEN, Cached.store, Cached.seen):
        container.clear()  # type: ignore[attr-defined]
    global VARIABLE
    TABLE[0], PLACE.last, Cached.whole, VARIABLE = Table(), None, None, None


@pytest.mark.parametrize("kind", [*KINDS, *WRITTEN])
def test_caches_hold_numbers_afterwards(kind: str) -> None:
    torch.manual_seed(0)
    model = Cached(kind).eval()
    expected = float(torch.linalg.matrix_norm(model.layer.weight.detach().double(), 2))
    assert lipfast.upper_bound(model, X).value == pytest.approx(expected, rel=1e-5)
    assert not any(isinstance(value, FakeTensor) for value in held_tensors())
    assert type(model.table(4)) is Tensor
    assert model(X).sum().item() == pytest.approx(model(X).sum().item())


@pytest.mark.parametrize(
    ("kind", "error"),
    [("method", ValueError), ("tuples", KeyboardInterrupt), ("variable", ValueError)],
)
def test_after_traces_that_fail(kind: str, error: type[BaseException]) -> None:
    class Failing(Cached):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if isinstance(x, FakeTensor):
                raise error
            return y

    model = Failing(kind).eval()
    with contextlib.suppress(LipfastError, KeyboardInterrupt):
        lipfast.upper_bound(model, X)
    assert not any(isinstance(value, FakeTensor) for value in held_tensors())


def test_what_is_cached_of_parameters_stays_a_function_of_them() -> None:
    class Doubled(nn.Linear):
        @functools.lru_cache(maxsize=4)  # noqa: B019
        def doubled(self) -> Tensor:
            return 2 * self.weight

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.doubled(), self.bias)

    model = Doubled(4, 4)
    plan = lipfast.compile(model, X)
    state = model.state_dict()
    value = plan.upper(state).value
    assert value == pytest.approx(2 * float(torch.linalg.matrix_norm(model.weight, 2)), rel=1e-5)
    tripled = {name: 3 * entry for name, entry in state.items()}
    assert plan.upper(tripled).value == pytest.approx(3 * value, rel=1e-6)


def test_what_cannot_be_taken_out_is_named() -> None:
    class Tracing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, FakeTensor):
                PLACE.last = x
            return super().forward(x)

    with pytest.raises(TraceError, match=r"Tracing keeps .* in SimpleNamespace\.last"):
        exported(Tracing(4, 4), (X,))

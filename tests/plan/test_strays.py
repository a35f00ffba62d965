"""Tensors of a trace are taken out of a model's caches, wherever those are."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import UserDict, deque
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
USER: UserDict[Any, Any] = UserDict()
whole: Tensor | None = None
PLACE = types.SimpleNamespace(last=None)
HIDDEN = [types.SimpleNamespace(last=None)]


@functools.cache
def _unbounded(n: int) -> Tensor:
    return torch.arange(n) * 0.5


@functools.lru_cache(maxsize=2)
def _bounded(n: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    return torch.arange(n) * 0.5, (torch.arange(n) * 2.0,)


def remembered(function: Any) -> Any:
    """A cache in the closure of a decorator."""
    results: dict[int, Tensor] = {}

    @functools.wraps(function)
    def found(self: Any, n: int) -> Tensor:
        if n not in results:
            results[n] = function(self, n)
        return results[n]

    return found


class Slotted:
    """A place without a dict."""

    __slots__ = ("whole",)


SLOT = Slotted()


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

    @remembered
    def closure(self, n: int) -> Tensor:
        return torch.arange(n) * 0.5

    @staticmethod
    @functools.cache
    def static(n: int) -> dict[str, list[Tensor]]:
        return {"deep": [torch.arange(n) * 0.5]}

    def added(self, n: int) -> Tensor:
        if self.kind in ("method", "closure"):
            found: Tensor = getattr(self, {"method": "table"}.get(self.kind, self.kind))(n)
        elif self.kind == "function":
            found = _unbounded(n)
        elif self.kind == "tuples":
            found = _bounded(n)[1][0]
        elif self.kind == "static":
            found = self.static(n)["deep"][0]
        elif self.kind == "helper":
            found = TABLE[0].values
        elif self.kind in ("class", "file", "user"):
            store = {"class": self.store, "file": STORE, "user": USER}[self.kind]
            if n not in store:
                store[n] = (torch.arange(n) * 0.5,)
            found = store[n][0]
        else:
            owner = {"variable": sys.modules[__name__], "attribute": Cached, "slot": SLOT}.get(
                self.kind, Cached.added
            )
            if getattr(owner, "whole", None) is None:
                setattr(owner, "whole", torch.arange(n) * 0.5)  # noqa: B010
            found = owner.whole  # type: ignore[union-attr]
        return found

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.kind not in WRITTEN:
            return y + self.added(x.shape[1])
        if self.kind == "inputs":
            SEEN.append(x)
        elif self.kind == "list":
            self.seen.append((y, self.layer.weight))
        else:
            PLACE.last = y
        return y


KINDS = (
    *("method", "function", "tuples", "static", "closure", "helper", "class", "file", "user"),
    *("variable", "attribute", "slot", "attribute of a method"),
)
WRITTEN = ("inputs", "list", "last")


def held_tensors() -> list[Tensor]:
    """What the caches hold."""
    found = [_unbounded(4), *_bounded(4), TABLE[0].values, *SEEN, PLACE.last]
    found += [whole, Cached.whole, *Cached.store.values(), *STORE.values(), *Cached.seen]
    found += [*USER.values(), getattr(SLOT, "whole", None), vars(Cached.added)]
    found += [Cached.static(4), Cached.closure(None, 4)]
    leaves = torch.utils._pytree.tree_leaves(found)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.fixture(autouse=True)
def empty() -> None:
    for cache in (_unbounded, _bounded, Cached.table, Cached.static):
        cache.cache_clear()
    for container in (STORE, SEEN, USER, Cached.store, Cached.seen, vars(Cached.added)):
        container.clear()  # type: ignore[attr-defined]
    TABLE[0], PLACE.last, Cached.whole = Table(), None, None
    globals()["whole"] = SLOT.whole = None


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
    [("method", ValueError), ("tuples", KeyboardInterrupt), ("attribute of a method", ValueError)],
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
    assert value == pytest.approx(
        2 * float(torch.linalg.matrix_norm(model.weight.detach(), 2)), rel=1e-5
    )
    tripled = {name: 3 * entry for name, entry in state.items()}
    assert plan.upper(tripled).value == pytest.approx(3 * value, rel=1e-6)


def test_what_cannot_be_taken_out_is_named() -> None:
    class Tracing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, FakeTensor):
                HIDDEN[0].last = x
            return super().forward(x)

    with pytest.raises(TraceError, match=r"Tracing keeps .* in SimpleNamespace\.last"):
        exported(Tracing(4, 4), (X,))

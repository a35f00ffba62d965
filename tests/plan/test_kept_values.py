"""Values of many kinds are put back: where they lie, what they hold, and what refers to them."""

from __future__ import annotations

import array
import collections
import io
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.plan import modules
from lipfast.plan.modules import evaluation_mode


def _calls(x: Tensor) -> Tensor:
    return x


def _hook(gradient: Tensor) -> Tensor:
    return 2 * gradient


class Ordered(collections.OrderedDict[str, int]):
    """Notes what is set."""

    noted: list[str] = []  # noqa: RUF012

    def __setitem__(self, key: str, value: int) -> None:
        self.noted.append(key)
        super().__setitem__(key, value)


# A value, what forward does to it, and what is read of it.
Case = tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], object]]
CASES: dict[str, Case] = {
    "UserDict": (lambda: collections.UserDict(a=1), lambda v: v.update(b=2), dict),
    "Counter": (lambda: collections.Counter("aab"), lambda v: v.update("abc"), dict),
    "OrderedDict": (
        lambda: collections.OrderedDict(a=1, b=2),
        lambda v: v.move_to_end("a"),
        lambda v: (list(v.items()), list(reversed(v))),
    ),
    "overridden": (lambda: Ordered(a=1), lambda v: v.pop("a"), lambda v: (dict(v), Ordered.noted)),
    "defaultdict": (lambda: collections.defaultdict(list), lambda v: v["x"].append(1), dict),
    "Queue": (queue.Queue, lambda v: v.put(1), lambda v: (v.qsize(), v.unfinished_tasks)),
    "StringIO": (
        lambda: io.StringIO("text"),
        lambda v: (v.read(2), v.write("more")),
        lambda v: (v.getvalue(), v.tell()),
    ),
    "BytesIO": (
        lambda: io.BytesIO(b"text"),
        lambda v: (v.read(2), v.write(b"more")),
        lambda v: (v.getvalue(), v.tell()),
    ),
    "bytearray": (lambda: bytearray(b"a"), lambda v: v.extend(b"b"), bytes),
    "numbers": (lambda: array.array("d", [1.0, float("nan")]), lambda v: v.append(2.0), bytes),
    "RandomState": (
        lambda: np.random.RandomState(3),
        lambda v: v.rand(),
        lambda v: v.get_state()[2],
    ),
    "array of lists": (
        lambda: np.array([[1], [2, 3], None], dtype=object),
        lambda v: (v[0].append(9), v.__setitem__(2, [1])),
        str,
    ),
    "function": (lambda: _calls, lambda v: setattr(v, "count", 1), vars),
    "conjugate": (
        lambda: torch.full((2,), 1 + 2j).conj(),
        lambda v: v.mul_(2),
        lambda v: (v.tolist(), v.is_conj(), v.data_ptr()),
    ),
    "large conjugate": (
        lambda: torch.full((5000,), 1 + 2j).conj(),
        lambda v: v.data.mul_(2),
        lambda v: (v.sum().item(), v.is_conj(), v.data_ptr()),
    ),
    "negative": (
        lambda: torch._neg_view(torch.ones(2)),
        lambda v: v.mul_(2),
        lambda v: (v.tolist(), v.is_neg(), v.data_ptr()),
    ),
    "hooks": (
        lambda: nn.Parameter(torch.ones(2)),
        lambda v: v.register_hook(_hook),
        lambda v: (v._backward_hooks, torch.autograd.grad(v.sum(), v)[0].tolist()),
    ),
}


class Holder(nn.Module):
    def __init__(self, value: Any, write: Callable[[Any], object]) -> None:
        super().__init__()
        self.value, self.write = value, write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.value)
        return 2 * x


@pytest.mark.parametrize("name", CASES)
def test_values_are_put_back(name: str) -> None:
    make, write, read = CASES[name]
    model = Holder(make(), write)
    before, address = repr(read(model.value)), id(model.value)
    for _ in range(2):
        with evaluation_mode(model) as kept:
            model(torch.ones(1))
            assert kept.written() or name == "hooks"
        assert repr(read(model.value)) == before
        assert id(model.value) == address


def test_hooks_that_were_there_stay_and_can_be_removed() -> None:
    parameter = nn.Parameter(torch.ones(2))
    handle = parameter.register_hook(_hook)
    with evaluation_mode(Holder(parameter, lambda v: v.register_hook(_hook))) as kept:
        parameter.register_hook(_hook)
        assert kept.written()
    assert torch.autograd.grad(parameter.sum(), parameter)[0].tolist() == [2, 2]
    handle.remove()
    assert torch.autograd.grad(parameter.sum(), parameter)[0].tolist() == [1, 1]


class Counting(nn.Linear):
    """Writes to attributes of its class, to slots, and to a method."""

    __slots__ = ("__hidden", "listed", "unset")
    calls = 0
    log: list[int] = []  # noqa: RUF012
    table: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.__hidden, self.listed = 1, [0]

    def helper(self) -> None:
        """Has attributes."""

    def forward(self, x: Tensor) -> Tensor:
        self.__hidden, self.unset = self.__hidden + 1, 3
        self.listed.append(1)
        Counting.calls += 1
        Counting.log.append(1)
        Counting.table[len(self.table)] = x
        Counting.new = x  # type: ignore[attr-defined]
        Counting.helper.count = 1  # type: ignore[attr-defined]
        return super().forward(x)

    def state(self) -> tuple[object, ...]:
        return (
            *(self.__hidden, list(self.listed), hasattr(self, "unset"), self.calls),
            *(list(self.log), dict(self.table), hasattr(Counting, "new"), vars(Counting.helper)),
        )


@pytest.mark.parametrize(
    "call",
    [
        lipfast.compile,
        lambda model, x: lipfast.jacobian_norms(model, x, method="rows"),
        lipfast.lower_bound,
    ],
)
def test_classes_slots_and_methods(call: Callable[[nn.Module, Tensor], object]) -> None:
    model = Counting()
    before = repr(model.state())
    call(model, torch.ones(3, 4))
    assert repr(model.state()) == before


def test_modes_that_forward_sets() -> None:
    def write(_: object) -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        torch.set_grad_enabled(False)

    threads = torch.get_num_threads()
    with evaluation_mode(model := Holder(None, write)):
        model(torch.ones(1))
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_one_copy_of_the_weights_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations inside one another share what is kept."""
    made: list[object] = []
    kept = modules.Kept
    monkeypatch.setattr(modules, "Kept", lambda *args: made.append(args) or kept(*args))
    model = nn.Linear(4, 4)
    with evaluation_mode(model) as outer, evaluation_mode(model) as inner:
        assert inner is outer
        model.weight.data.fill_(1.0)
    assert len(made) == 1
    assert not torch.equal(model.weight, torch.ones(4, 4))

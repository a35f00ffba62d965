"""Wrappers around a module."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.plan.modules import unwrap

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),  # type: ignore[dict-item]
}


def identity() -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def own_forward(model: nn.Module) -> None:
    found = model.forward
    model.forward = lambda x: 3 * found(x)  # type: ignore[method-assign]


def wrapped_forward(model: nn.Module) -> None:
    found = model.forward
    model.forward = functools.wraps(found)(lambda x: 3 * found(x))  # type: ignore[method-assign]


def partial_forward(model: nn.Module) -> None:
    found = model.forward
    model.forward = functools.partial(lambda k, x: k * found(x), 3)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hook": lambda model: model.register_forward_hook(lambda *call: 3 * call[2]),
    "pre-hook": lambda model: model.register_forward_pre_hook(lambda _, args: (3 * args[0],)),
    "forward": own_forward,
    "wrapped forward": wrapped_forward,
    "partial": partial_forward,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner = identity()
    assert unwrap(wrap(inner)) is inner
    assert unwrap(nn.DataParallel(wrap(inner))) is inner


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_one_that_does_more_is_refused(
    wrap: Callable[[nn.Module], nn.Module], change: Callable[[nn.Module], object]
) -> None:
    model = wrap(identity())
    change(model)
    with pytest.raises(ArgumentError, match=r"around the model has (hooks|a forward) of its own"):
        lipfast.upper_bound(model, X)


def test_hooks_of_all_modules_count() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *call: 3 * call[2])
    try:
        with pytest.raises(ArgumentError, match="has hooks"):
            unwrap(nn.DataParallel(identity()))
    finally:
        handle.remove()


def test_subclasses_and_names_are_no_wrappers() -> None:
    class Tripled(nn.DataParallel):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.module(x)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod, self.module = identity(), identity()

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self._orig_mod(x)

    hooked = nn.Sequential(nn.DataParallel(identity()))
    hooked[0].register_forward_hook(lambda *call: 3 * call[2])
    for model in (Tripled(identity()), Named(), hooked):
        assert lipfast.upper_bound(model, X).value == pytest.approx(3, rel=1e-5)

"""Conditions of a model on its buffers (``if self.initialised:``), decided while it is traced.

`torch.export` knows no values. Here what is computed of small buffers alone is computed with their
values beside the trace, and where Python asks for one (`bool`, `int`, `item`) it is answered. The
plan then holds for state dicts with the same values only. Whatever may have written a tensor makes
all values unknown, and afterwards (`plan.fidelity`) the module itself is asked: its answers must be
the same ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from lipfast.ops.restoring import Restoring

# Buffers with more entries are weights or statistics, which no condition should rest on.
_MOST_READ = 64
_ASKED: tuple[Any, ...] = (
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.item, Tensor.tolist, Tensor.is_nonzero),
)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout")


class _Traced:
    """A tensor of the trace (so that its id stays its own), its value, and of which buffers."""

    def __init__(self, traced: Tensor, value: Tensor, names: frozenset[str]) -> None:
        self.traced, self.value, self.names = traced, value, names
        self._version = self._written()

    @property
    def holds(self) -> bool:
        """Not if it was written where a mode sees nothing (`DisableTorchFunction`)."""
        return self._written() == self._version

    def _written(self) -> int:
        return 0 if self.traced.is_inference() else self.traced._version


class _Known(TorchFunctionMode):
    """Values of what depends on buffers only."""

    def __init__(self, buffers: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.read: dict[str, Tensor] = {}
        self.answers: list[Any] = []
        self._buffers = buffers
        # id of a tensor of the trace -> what is known of it.
        self._known: dict[int, _Traced] = {
            id(current[name]): _Traced(current[name], value, frozenset({name}))
            for name, value in buffers.items()
            if name in current
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves(args, kwargs)
        # Any tensor may share its memory with another. Overloads of ops are called ``add_.Tensor``.
        if _writes(func.__name__.partition(".")[0], kwargs):
            self._known = {}
        known = [self._entry(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        # Numbers of samples are symbols here, and anything elsewhere.
        if not known or None in known or any(isinstance(leaf, _SYMBOLS) for leaf in leaves):
            result = func(*args, **kwargs)
            if func in _ASKED:
                self.answers.append(None if isinstance(result, _SYMBOLS) else result)
            return result
        names = frozenset().union(*(entry.names for entry in known if entry is not None))

        def value(tensor: Tensor) -> Tensor:
            return self._known[id(tensor)].value

        args_of_values, kwargs_of_values = tree_map_only(Tensor, value, (tuple(args), kwargs))
        if func in _ASKED:
            self.read |= {name: self._buffers[name] for name in names}
            with _disable_current_modes():
                self.answers.append(func(*args_of_values, **kwargs_of_values))
            return self.answers[-1]
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not func.__name__.startswith(_RANDOM):
            with _disable_current_modes():
                found = func(*args_of_values, **kwargs_of_values)
            if isinstance(found, Tensor):
                self._known[id(result)] = _Traced(result, found, names)
        return result

    def _entry(self, tensor: Tensor) -> _Traced | None:
        found = self._known.get(id(tensor))
        return found if found is not None and found.holds else None


class Asked(TorchFunctionMode):
    """Notes what Python is told when it asks for a value.

    Attributes:
        answers: in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ASKED:
            self.answers.append(result)
        return result


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """All arguments, also those inside slices; a tensor there is an index whose value counts."""
    found: list[Any] = []
    for leaf in tree_flatten((tuple(args), kwargs))[0]:
        found += (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)
    return found


def _writes(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a function of this name changes a tensor (``add_``, ``__iadd__``, ``.data =``)."""
    if options.get("out") is not None or options.get("inplace"):
        return True
    special = name.endswith("__")
    in_place = name in ("__setitem__", "__set__", "__delete__") or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )
    return in_place if special else name.endswith("_")


@contextlib.contextmanager
def buffers_known(read: dict[str, Tensor], answers: list[Any], module: nn.Module) -> Iterator[None]:
    """Conditions on small buffers are answered inside.

    Args:
        read: gets name -> value of the buffers that are asked for.
        answers: gets all answers that are given.
        module: that is traced, in `evaluation_mode`.
    """
    buffers = {
        name: buffer.detach().clone()
        for name, buffer in module.named_buffers()
        if buffer.numel() <= _MOST_READ
    }
    original, had = module.forward, "forward" in vars(module)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Known(buffers, dict(module.named_buffers())) as known:
            try:
                return original(*args, **kwargs)
            finally:
                read.update(known.read)
                answers[:] = known.answers

    def put_back() -> None:
        if had:
            vars(module)["forward"] = original
        else:
            vars(module).pop("forward", None)

    undo = Restoring(put_back)
    with undo, undo, undo:
        vars(module)["forward"] = forward
        yield

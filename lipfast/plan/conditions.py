"""Conditions of a model on its buffers (``if self.initialised:``), decided while it is traced.

`torch.export` knows no values. Here what is computed of small buffers alone is computed with their
values beside the trace, and where Python asks for one (`bool`, `int`, `item`) it is answered. The
plan then holds for state dicts with the same values only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

# Buffers with more entries are weights or statistics, which no condition should rest on.
_MOST_READ = 64
_ASKED: tuple[Any, ...] = (
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.item, Tensor.tolist, Tensor.is_nonzero),
)
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "poisson", "dropout")


class _Known(TorchFunctionMode):
    """Values of what depends on buffers only."""

    def __init__(self, buffers: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.read: dict[str, Tensor] = {}
        self._buffers = buffers
        # id of a tensor of the trace -> it (so that the id stays its own), its value, the buffers.
        self._known: dict[int, tuple[Tensor, Tensor, frozenset[str]]] = {
            id(current[name]): (current[name], value, frozenset({name}))
            for name, value in buffers.items()
            if name in current
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        known = [self._known.get(id(tensor)) for tensor in tensors]
        if not known or None in known:
            return func(*args, **kwargs)
        names = frozenset().union(*(entry[2] for entry in known if entry is not None))

        def value(tensor: Tensor) -> Tensor:
            return self._known[id(tensor)][1]

        args_of_values, kwargs_of_values = tree_map_only(Tensor, value, (tuple(args), kwargs))
        if func in _ASKED:
            self.read |= {name: self._buffers[name] for name in names}
            with _disable_current_modes():
                return func(*args_of_values, **kwargs_of_values)
        result = func(*args, **kwargs)
        if _writes(func.__name__):  # in place: the values are not known any more
            self._known = {}
        elif isinstance(result, Tensor) and not func.__name__.startswith(_RANDOM):
            with _disable_current_modes():
                found = func(*args_of_values, **kwargs_of_values)
            if isinstance(found, Tensor):
                self._known[id(result)] = (result, found, names)
        return result


def _writes(name: str) -> bool:
    """Whether a function of this name changes a tensor (``add_``, ``__iadd__``)."""
    special = name.endswith("__")
    in_place = name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return in_place if special else name.endswith("_")


@contextlib.contextmanager
def buffers_known(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Conditions on small buffers are answered inside.

    Yields:
        Name -> value of the buffers that were asked for, filled while the module is evaluated.
    """
    read: dict[str, Tensor] = {}
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

    vars(module)["forward"] = forward
    try:
        yield read
    finally:
        if had:
            vars(module)["forward"] = original
        else:
            vars(module).pop("forward", None)

"""Tensors of a trace that a model's caches hold on to: they have no numbers, so they must go.

What a module leads to is put back (`plan.kept`). This is about the caches beyond that:
``functools.lru_cache``, containers of a class or of a file of Python code.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lipfast.plan.kept import users_classes

_LRU = type(functools.lru_cache(lambda: None))
_CONTAINERS = (dict, list, deque, set)
# Tuples inside tuples that a cache holds are followed this far.
_DEEPEST = 3
# The attributes of an owner, by its id.
_Before = dict[int, dict[str, Any]]


class Strays(TorchFunctionMode):
    """Notes, while a module is traced, the tensors that its code sees; afterwards drops them.

    To fill the caches by an evaluation before would make constants of what is calculated of
    parameters.

    Args:
        module: that is to be traced. The attributes of its classes, and the variables of the files
            that they are from, get back what they held.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._noted: dict[int, weakref.ref[Tensor]] = {}
        self._before: dict[int, dict[str, Any]] = {}
        for kind in users_classes(module.modules()):
            for owner in (kind, sys.modules.get(kind.__module__)):
                if owner is not None and id(owner) not in self._before:
                    self._before[id(owner)] = dict(vars(owner))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(result if isinstance(result, (tuple, list)) else (result,))):
            if isinstance(value, FakeTensor):
                self._noted[id(value)] = weakref.ref(value)
        return result

    def drop(self, program: ExportedProgram | None = None) -> list[str]:
        """Take the tensors out of the caches and containers that hold them.

        Args:
            program: what the trace gave, which may hold them; None if it failed.

        Returns:
            Attributes that hold some: what they held before is not known.
        """
        held = self._held(program)
        return list(dict.fromkeys(_dropped(held, self._before))) if held else []

    def _held(self, program: ExportedProgram | None) -> list[Any]:
        """Those that something holds beside the program.

        To count references takes microseconds, to look for them tens of milliseconds.
        """
        alive = [tensor for note in self._noted.values() if (tensor := note()) is not None]
        tensor, held = None, []
        known = _references(program, alive)
        while alive:
            tensor = alive.pop()
            if sys.getrefcount(tensor) > 2 + known[id(tensor)]:  # this name, and the argument
                held.append(tensor)
        return held


def _references(program: ExportedProgram | None, tensors: Sequence[Any]) -> Counter[int]:
    """How often a program holds which tensor, by its id."""
    if program is None or not tensors:
        return Counter()
    shown = (node.meta.get("val") for node in program.graph.nodes)
    followed = tensors[0].fake_mode.shape_env.tracked_fakes or ()
    return Counter(map(id, [*pytree.tree_leaves(list(shown)), *(e.fake for e in followed)]))


def _dropped(values: list[Any], before: _Before, depth: int = 0) -> Iterable[str]:
    """Take values out of what holds them; names of attributes that do."""
    ids = set(map(id, values))
    tuples: list[Any] = []
    for holder in gc.get_referrers(*values):
        if holder is values:
            continue
        if isinstance(holder, _LRU):
            holder.cache_clear()
        elif isinstance(holder, _CONTAINERS):
            yield from _out_of(holder, ids, before)
        elif isinstance(holder, (tuple, frozenset)):
            tuples.append(holder)
        elif isinstance(holder, types.CellType):
            yield "a variable of a closure"
        elif not isinstance(holder, types.FrameType) and not _is_torchs(holder):
            yield from _attributes(holder, getattr(holder, "__dict__", {}), ids, before)
    if tuples and depth < _DEEPEST:
        yield from _dropped(tuples, before, depth + 1)


def _out_of(container: Any, ids: set[int], before: _Before) -> Iterable[str]:
    owners = [owner for owner in gc.get_referrers(container) if owner is not container]
    if any(map(_is_torchs, owners)):
        return
    for owner in owners:
        if isinstance(owner, _LRU):  # without a limit it has a dict
            owner.cache_clear()
            return
        # A dict of a class has no other way to it; to write there would deceive the interpreter.
        if isinstance(owner, type) or getattr(owner, "__dict__", None) is container:
            yield from _attributes(owner, container, ids, before)
            return
    if isinstance(container, dict):
        entries = [k for k, value in container.items() if id(value) in ids or id(k) in ids]
        for key in entries:
            del container[key]
    elif isinstance(container, set):
        container -= {value for value in container if id(value) in ids}
    else:
        kept = [value for value in container if id(value) not in ids]
        container.clear()
        container.extend(kept)


def _attributes(owner: Any, table: Any, ids: set[int], before: _Before) -> Iterable[str]:
    for name in [name for name, value in table.items() if id(value) in ids]:
        earlier = before.get(id(owner))
        cached = isinstance(vars(type(owner)).get(name), functools.cached_property)
        if earlier is not None and name in earlier and id(earlier[name]) not in ids:
            setattr(owner, name, earlier[name])
        elif cached or (earlier is not None and name not in earlier):
            delattr(owner, name)
        else:
            called = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None)
            yield f"{called or type(owner).__name__}.{name}"


def _is_torchs(owner: object) -> bool:
    kind = owner if isinstance(owner, type) else type(owner)
    name = owner.__name__ if isinstance(owner, types.ModuleType) else kind.__module__
    return name.partition(".")[0] == "torch"

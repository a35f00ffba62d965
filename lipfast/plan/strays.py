"""Tensors of a trace that a model's caches hold on to: they have no numbers, so they must go.

What a module leads to is put back (`plan.kept`). This is about the caches beyond that:
``functools.lru_cache``, containers and variables of files and closures, objects there.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections import Counter, UserDict, deque
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lipfast.plan.kept import slots_of, users_classes

_LRU = type(functools.lru_cache(lambda: None))
_MUTABLE = (dict, list, deque, set)
_COLLECTIONS = (*_MUTABLE, tuple, frozenset)
# Containers inside containers are followed this far, and those with more entries not.
_DEEPEST, _LARGEST = 3, 1000
_NONE: frozenset[int] = frozenset()


class Strays(TorchFunctionMode):
    """Notes, while a module is traced, the tensors that its code sees; afterwards drops them.

    To fill the caches by an evaluation before would make constants of what is calculated of
    parameters.

    Args:
        module: that is to be traced. The variables of the files that its classes are from, and what
            functions, classes and objects there hold, get back what they held.

    Attributes:
        program: what the trace gave, which may hold such tensors; None before, and if it failed.
        holders: what still holds some after `drop`: what was there before is not known.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.program: ExportedProgram | None = None
        self.holders: list[str] = []
        self._noted: dict[int, weakref.ref[Tensor]] = {}
        self._before = _Before()
        for kind in users_classes(module.modules()):
            self._before.note_file(kind.__module__)
            self._before.note_members(kind)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(result if isinstance(result, (tuple, list)) else (result,))):
            if isinstance(value, FakeTensor):
                self._noted[id(value)] = weakref.ref(value)
        return result

    def drop(self) -> None:
        """Take the tensors out of the caches and containers that hold them.

        Called again, it finishes what it began.
        """
        self._before.put_back()
        # A trace that failed holds all its tensors itself: among those nothing else is found.
        held = self._held() if self.program is not None else []
        self.holders = list(dict.fromkeys(_dropped(held, self._before))) if held else []

    def _held(self) -> list[Any]:
        """Those that something holds beside the program.

        To count references takes microseconds, to look for them tens of milliseconds.
        """
        alive = [tensor for note in self._noted.values() if (tensor := note()) is not None]
        tensor, held = None, []
        known = _held_by(self.program, alive)
        while alive:
            tensor = alive.pop()
            if sys.getrefcount(tensor) > 2 + known[id(tensor)]:  # this name, and the argument
                held.append(tensor)
        return held


class _Before:
    """What attributes and variables of closures held, by the ids of their owners and cells.

    Attributes:
        tables: attributes of classes, files, functions and objects.
        cells: contents of variables of closures, in a tuple.
        containers: by their ids those that were there, which are written to, not taken away.
    """

    def __init__(self) -> None:
        self.tables: dict[int, dict[str, Any]] = {}
        self.cells: dict[int, tuple[Any, ...]] = {}
        self.containers: dict[int, Any] = {}
        self._owners: list[Any] = []
        self._cells: list[types.CellType] = []

    def put_back(self) -> None:
        """Put back what holds tensors of a trace now, and take these out of containers."""
        for owner in self._owners:
            for name, value in _table_of(owner).items():
                unwrapped = getattr(value, "__func__", value)
                if isinstance(unwrapped, _LRU):
                    if _holds(unwrapped):
                        unwrapped.cache_clear()
                elif value is not self.tables[id(owner)].get(name) and _holds(value):
                    _set_back(owner, name, self.tables[id(owner)])
        for cell in self._cells:
            if any(map(_holds, _contents(cell))):
                _set_cell(cell, self.cells[id(cell)])
        for container in self.containers.values():
            inside = container.values() if isinstance(container, dict) else container
            ids = frozenset(id(v) for v in (*container, *inside) if _holds(v))
            if ids:
                _take_out(container, ids)

    def note_file(self, name: str) -> None:
        """Variables of a file of Python code; what functions, classes and objects there hold."""
        file = sys.modules.get(name)
        if file is not None and id(file) not in self.tables:
            self.note_members(file)
            for value in vars(file).values():
                kind = value if isinstance(value, type) else type(value)
                if kind.__module__ != name and kind is not types.SimpleNamespace:
                    continue
                if value is kind:
                    self.note_members(kind)
                else:
                    self._note_table(value, _table_of(value))

    def note_members(self, owner: Any) -> None:
        """Attributes of a class or file, and what its functions hold."""
        if id(owner) not in self.tables:
            self._note_table(owner, vars(owner))
            for value in vars(owner).values():
                self._note_function(getattr(value, "__func__", getattr(value, "fget", value)))

    def _note_table(self, owner: Any, table: Any) -> None:
        self._owners.append(owner)
        self.tables[id(owner)] = dict(table)
        self._note_containers(table.values())

    def _note_containers(self, values: Iterable[Any], depth: int = 0) -> None:
        for held in values:
            value = held.data if isinstance(held, UserDict) else held
            if isinstance(value, _MUTABLE) and id(value) not in self.containers:
                self.containers[id(value)] = value
                if depth < _DEEPEST and len(value) <= _LARGEST:
                    inside = value.values() if isinstance(value, dict) else value
                    self._note_containers(list(inside), depth + 1)

    def _note_function(self, function: Any) -> None:
        while isinstance(function, types.FunctionType) and id(function) not in self.tables:
            self._note_table(function, function.__dict__)
            for cell in function.__closure__ or ():
                self._cells.append(cell)
                self.cells[id(cell)] = _contents(cell)
                self._note_containers(self.cells[id(cell)])
            function = function.__dict__.get("__wrapped__")


def _holds(value: Any, depth: int = 0) -> bool:
    """Whether a value is a tensor of a trace, or leads to one."""
    if isinstance(value, FakeTensor):
        return True
    if isinstance(value, UserDict):
        value = value.data
    if isinstance(value, dict):
        inside: Iterable[Any] = (*value, *value.values())
    elif isinstance(value, _LRU):
        inside = gc.get_referents(value)
    elif isinstance(value, _COLLECTIONS):
        inside = list(value)
    else:
        return False
    return depth <= _DEEPEST + 1 and any(_holds(entry, depth + 1) for entry in inside)


def _set_back(owner: Any, name: str, earlier: dict[str, Any]) -> None:
    if name in earlier:
        setattr(owner, name, earlier[name])
    else:
        delattr(owner, name)


def _set_cell(cell: types.CellType, earlier: tuple[Any, ...]) -> None:
    if earlier:
        (cell.cell_contents,) = earlier
    else:
        del cell.cell_contents


def _table_of(value: Any) -> dict[str, Any]:
    """Attributes of an object."""
    if isinstance(value, type):
        return dict(vars(value))
    kind: Any = type(value)
    slots = {k: getattr(value, k) for k in slots_of(kind) if hasattr(value, k)}
    return {**getattr(value, "__dict__", {}), **slots}


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not set yet
        return ()


def _held_by(program: ExportedProgram | None, tensors: Sequence[Any]) -> Counter[int]:
    """How often a program holds which tensor, by its id."""
    if program is None or not tensors:
        return Counter()
    shown = (node.meta.get("val") for node in program.graph.nodes)
    followed = tensors[0].fake_mode.shape_env.tracked_fakes or ()
    return Counter(map(id, [*pytree.tree_leaves(list(shown)), *(e.fake for e in followed)]))


def _dropped(values: list[Any], before: _Before, inside: frozenset[int] = _NONE) -> list[str]:
    """Take values out of what holds them.

    Args:
        values: tensors, or containers that were made to hold them.
        before: what was there.
        inside: ids of what the values hold of this.

    Returns:
        Names of what still holds one.
    """
    ids = inside.union(map(id, values))
    found: list[str] = []
    made: list[Any] = []
    holders = [
        holder
        for holder in gc.get_referrers(*values)
        if holder is not values and not isinstance(holder, types.FrameType)
        if not _is_torchs(holder) and id(holder) not in ids
    ]
    owners = _owners_of([holder for holder in holders if isinstance(holder, _COLLECTIONS)])
    while holders:
        holder = holders.pop()
        if isinstance(holder, _LRU):
            holder.cache_clear()
        elif isinstance(holder, _COLLECTIONS):
            owner = owners.get(id(holder))
            if isinstance(owner, _LRU):  # without a limit it has a dict
                owner.cache_clear()
            elif owner is None and id(holder) in before.containers:
                _take_out(holder, ids)
            elif owner is None:
                made.append(holder)
            elif not _is_torchs(owner):
                found += _attributes(owner, holder, ids, before)
        elif isinstance(holder, types.CellType):
            found += _out_of_closure(holder, ids, before)
        else:
            found += _attributes(holder, _table_of(holder), ids, before)
    holder = owner = None
    owners.clear()
    if made:
        found += _dropped(made, before, ids)
    return found


def _owners_of(containers: list[Any]) -> dict[int, Any]:
    """Who has a container as its own, by the id of this: as attributes, or as a cache's entries.

    All are asked for at once: every question reads all objects of the process.
    """
    ids = frozenset(map(id, containers))
    found: dict[int, Any] = {}
    for owner in gc.get_referrers(*containers) if containers else ():
        if isinstance(owner, _LRU) or _is_torchs(owner):
            own = [id(value) for value in gc.get_referents(owner)]
        elif isinstance(owner, type):
            # A dict of a class has no other way to it; to write there would deceive Python.
            own = [id(value) for value in gc.get_referents(owner) if isinstance(value, dict)]
        else:
            own = [id(getattr(owner, "__dict__", None))]
        found.update((key, owner) for key in own if key in ids)
    return found


def _take_out(container: Any, ids: frozenset[int]) -> None:
    """Remove entries from what can be written to."""
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


def _out_of_closure(cell: types.CellType, ids: frozenset[int], before: _Before) -> Iterable[str]:
    earlier = before.cells.get(id(cell))
    if earlier is None:
        # Variables of functions that ran, such as those of the trace, go with them.
        if isinstance(cell.cell_contents, _MUTABLE):
            _take_out(cell.cell_contents, ids)
        elif any(isinstance(owner, tuple) for owner in gc.get_referrers(cell)):
            yield "a variable of a closure"
    else:
        _set_cell(cell, earlier)


def _attributes(owner: Any, table: Any, ids: frozenset[int], before: _Before) -> Iterable[str]:
    earlier = before.tables.get(id(owner))
    for name, value in [(name, value) for name, value in table.items() if id(value) in ids]:
        cached = isinstance(vars(type(owner)).get(name), functools.cached_property)
        if earlier is not None and name in earlier and id(earlier[name]) not in ids:
            _set_back(owner, name, earlier)
        elif cached or (earlier is not None and name not in earlier):
            _set_back(owner, name, {})
        elif isinstance(value, _MUTABLE):
            _take_out(value, ids)
        else:
            called = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None)
            yield f"{called or type(owner).__name__}.{name}"


def _is_torchs(owner: object) -> bool:
    kind = owner if isinstance(owner, type) else type(owner)
    name = owner.__name__ if isinstance(owner, types.ModuleType) else kind.__module__
    return name.partition(".")[0] == "torch"

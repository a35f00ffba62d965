"""What a module holds, kept while its forward runs: forward may write to all of it.

Followed are modules, tensors, plain containers and other objects, as far as the module leads to
them, and the attributes of its classes and functions. Contents of tensors are copied: neither
version counters nor dispatch see what goes through `Tensor.data` or numpy. Not kept are variables
of closures and files, what other libraries hold, and what only moves on (`itertools.count`, files).
"""

from __future__ import annotations

import array
import io
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipfast.plan.kept_values import (
    KeptClass,
    KeptGenerator,
    KeptSequence,
    KeptSlot,
    KeptState,
    KeptTable,
    KeptTensor,
    Owner,
    snapshot,
    strided_parts,
)

# What cannot change, and what leads nowhere.
_ATOMS = frozenset(
    [
        *(bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, torch.Size),
        *(types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout),
    ]
)
# A reference to a trainer leads to the whole program: objects are followed this far.
_DEEPEST_KEPT = 3
_LIBRARIES = frozenset(("torch", "builtins", "typing", "abc"))
# Modules of Python whose objects hold what a user puts there: UserDict, Queue, Namespace.
_FOLLOWED = frozenset(("types", "argparse", "collections", "queue", "__main__"))
_SOURCES = (
    *(torch.Generator, random.Random),
    *(np.random.Generator, np.random.BitGenerator, np.random.RandomState),
)
_KINDS_KEPT = frozenset((dict, OrderedDict, list, set))
# These layers list their parameters anew whenever they are given others.
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_TABLES = ("", "_parameters", "_buffers")
_DERIVED = ("_flat_weights", "_flat_weight_refs")


class Kept:
    """The state of a module, found by following what it holds.

    Args:
        root: the module.
        modules: it and those below it.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._root = root
        self._seen: dict[int, object] = {}  # alive as long as this is, so ids are theirs
        self._empty: list[Any] = []
        self._kept: list[Any] = []
        self._generators: tuple[KeptState, ...] = ()
        self._drew = False
        # From the back: each entry is a value, who holds it, and how many objects lead to it.
        self._pending: list[tuple[Any, Owner, int]] = [(m, (m, ""), 0) for m in modules]
        self._kept += [KeptGenerator(generator, (root, "")) for generator in _torch_generators()]
        seen, pending = self._seen, self._pending
        while pending:
            value, owner, depth = pending.pop()
            if id(value) not in seen:
                seen[id(value)] = value
                self._follow(value, owner, depth)

    def _follow(self, value: Any, owner: Owner, depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, owner, depth)
        elif isinstance(value, nn.Module):
            self._follow_module(value)
        elif isinstance(value, dict):
            self._table(value, owner, depth)
        elif isinstance(value, (list, deque, set)):
            self._sequence(value, owner, depth)
        elif isinstance(value, (tuple, frozenset)):
            self._push(value, owner, depth)
        elif isinstance(value, partial):
            self._push((value.func, value.args, value.keywords), owner, depth)
        elif isinstance(value, types.MethodType):
            self._push((value.__self__, value.__func__.__dict__), owner, depth)
        elif isinstance(value, torch.Generator):
            self._kept.append(KeptGenerator(value, owner))
        elif (access := _access(value)) is not None:
            self._kept.append(KeptState(value, owner, *access))
            if isinstance(value, np.ndarray) and value.dtype == object:
                self._push(value.flat, owner, depth)
        elif depth < _DEEPEST_KEPT and _is_followed(type(value)):
            self._object(value, owner, depth + 1)

    def _follow_module(self, module: nn.Module) -> None:
        table = vars(module)
        self._kept.append(KeptTable(table, (module, "")))
        empty, pending = self._empty, self._pending
        for name, value in table.items():
            kind = type(value)
            if kind in _KINDS_KEPT and not value:
                empty.append(value)
            elif kind is types.FunctionType:
                self._function(value, (module, name))
            elif kind not in _ATOMS:
                pending.append((value, (module, name), 0))
        kind_of_module: Any = type(module)
        slots, classes = _of_user(kind_of_module)
        if slots:
            self._slots(module, slots, (module, ""), 0)
        for kind in classes:
            if id(kind) not in self._seen:
                self._seen[id(kind)] = kind
                self._class(kind, module)
        if isinstance(module, torch.jit.ScriptModule):  # its tables are not in Python
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            self._push(own, (module, "_parameters"), 0)

    def _push(self, values: Iterable[Any], owner: Owner, depth: int) -> None:
        self._pending += [(v, owner, depth) for v in values if type(v) not in _ATOMS]

    def _table(self, table: dict[Any, Any], owner: Owner, depth: int) -> None:
        if not table:
            self._empty.append(table)
            return
        self._kept.append(KeptTable(table, owner))
        module, name = owner
        if name in ("_parameters", "_buffers"):
            self._pending += [(v, (module, k), depth) for k, v in table.items() if v is not None]
        elif name != "_modules":
            self._push(table.values(), owner, depth)

    def _sequence(self, values: Any, owner: Owner, depth: int) -> None:
        if not values:
            self._empty.append(values)
            return
        self._kept.append(KeptSequence(values, owner))
        self._push(values, owner, depth)

    def _tensor(self, tensor: Tensor, owner: Owner, depth: int) -> None:
        self._kept.append(KeptTensor(tensor, owner))
        inside: list[Any] = [tensor.grad] if tensor.is_leaf and tensor.grad is not None else []
        if tensor.layout is not torch.strided:
            inside += strided_parts(tensor.detach())
        elif hasattr(tensor, "__tensor_flatten__"):
            inside += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        table = getattr(tensor, "__dict__", None)
        hooks = tensor._backward_hooks
        if hooks is not None:
            self._table(hooks, owner, depth)
        if table:
            inside.append(table)
        elif table is not None:
            self._empty.append(table)
        if inside:
            self._push(inside, owner, depth)

    def _object(self, value: Any, owner: Owner, depth: int) -> None:
        if isinstance(getattr(value, "__dict__", None), dict):
            self._table(vars(value), owner, depth)
        kind: Any = type(value)
        self._slots(value, slots_of(kind), owner, depth)

    def _slots(self, value: Any, names: Iterable[str], owner: Owner, depth: int) -> None:
        for name in names:
            slot = KeptSlot(value, name, (owner[0], owner[1] or name))
            self._kept.append(slot)
            self._push(slot.found, slot.owner, depth)

    def _class(self, kind: type, module: nn.Module) -> None:
        self._kept.append(KeptClass(kind, (module, "")))
        for name, value in vars(kind).items():
            if name.startswith("__"):
                continue
            if type(value) is types.FunctionType:
                self._function(value, (module, name))
            elif type(value) not in _ATOMS:
                self._pending.append((value, (module, name), 0))

    def _function(self, function: types.FunctionType, owner: Owner) -> None:
        if function.__dict__:
            self._pending.append((function.__dict__, owner, 0))
        else:
            self._empty.append(function.__dict__)

    def computed(self) -> list[Tensor]:
        """Tensors that hang on a graph: results of autograd that the module holds on to."""
        tensors = (kept.value for kept in self._kept if isinstance(kept, KeptTensor))
        return [tensor for tensor in tensors if not tensor.is_leaf]

    def keep_generators(self) -> None:
        """Keep the generators of Python and numpy that belong to the process, too."""
        if self._generators:  # as an evaluation around this one found them
            return
        owner = (self._root, "")
        source = np.random.mtrand._rand
        self._generators = (
            KeptState(random, owner, random.getstate, random.setstate),
            KeptState(source, owner, source.get_state, source.set_state),
        )

    def restore(self) -> None:
        """Put everything back; what is interrupted finishes when it is called again."""
        if any(self._empty):
            for container in self._empty:
                container.clear()
        for kept in self._kept:
            if kept.differs():
                with torch.no_grad():
                    kept.restore()

    def restore_generators(self) -> bool:
        """Put back the generators of the process; whether they had ever moved."""
        moved = [generator for generator in self._generators if generator.differs()]
        self._drew = self._drew or bool(moved)
        for generator in moved:
            generator.restore()
        return self._drew

    def drew(self) -> bool:
        """Whether random numbers were drawn, by the process's generators or the module's own."""
        sources = (kept for kept in self._kept if isinstance(kept.value, _SOURCES))
        return any(kept.differs() for kept in (*self._generators, *sources))

    def written(self) -> dict[str, Any]:
        """What is not as it was found: how it is called, and what it is now."""
        changed = [kept for kept in self._kept if kept.differs()]
        filled = list(filter(None, self._empty))
        if not changed and not filled:
            return {}
        paths = self._paths()
        found = {self._name_of(value, paths): snapshot(value) for value in filled}
        tensors = self._rewritten()
        for kept in changed:
            table = vars(kept.value) if isinstance(kept, KeptClass) else kept.value
            if isinstance(kept, (KeptTable, KeptClass)) and kept.owner[1] in _TABLES:
                derived = _DERIVED if type(kept.owner[0]) in _RECURRENT else ()
                for name in kept.names():
                    if name in derived:
                        continue
                    found[_name_in(kept.owner, name, paths)] = snapshot(table.get(name))
            elif isinstance(kept, KeptSlot):
                found[_name_in(kept.owner, "", paths)] = snapshot(kept.now())
            elif kept in tensors or not isinstance(kept, (KeptTensor, KeptGenerator)):
                found[_name_in(kept.owner, "", paths)] = snapshot(kept.value)
        return found

    def rewritten(self) -> list[str]:
        """What the tensors are called that hold other numbers than they did."""
        found = self._rewritten()
        paths = self._paths() if found else {}
        return [_name_in(kept.owner, "", paths) for kept in found]

    def _rewritten(self) -> list[KeptTensor]:
        tensors = [kept for kept in self._kept if isinstance(kept, KeptTensor)]
        gradients = {id(kept.grad) for kept in tensors}
        return [kept for kept in tensors if kept.rewritten() and id(kept.value) not in gradients]

    def _paths(self) -> dict[int, str]:
        return {id(module): name for name, module in self._root.named_modules()}

    def _name_of(self, container: object, paths: Mapping[int, str]) -> str:
        for module in self._root.modules():
            for name, value in vars(module).items():
                if value is container:
                    return _name_in((module, name), "", paths)
        return "attribute"


def _access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """How the state of what has one is read and set."""
    found: tuple[Callable[[], Any], Callable[[Any], object]] | None = None
    if isinstance(value, np.ndarray):
        found = value.copy, partial(np.copyto, value)
    elif isinstance(value, random.Random):
        found = value.getstate, value.setstate
    elif isinstance(value, np.random.RandomState):
        found = value.get_state, value.set_state
    elif isinstance(value, np.random.Generator):
        generator: Any = value.bit_generator
        source = generator if hasattr(generator, "state") else generator._bit_generator
        found = lambda: source.state, partial(setattr, source, "state")
    elif isinstance(value, np.random.BitGenerator):
        bits: Any = value
        found = lambda: bits.state, partial(setattr, bits, "state")
    elif isinstance(value, (bytearray, array.array)):
        found = partial(bytes, value), partial(_refill, value)
    elif isinstance(value, (io.StringIO, io.BytesIO)) and not value.closed:
        buffer: Any = value
        found = buffer.__getstate__, buffer.__setstate__
    return found


def _refill(value: bytearray | array.array[Any], content: bytes) -> None:
    del value[:]
    if isinstance(value, bytearray):
        value += content
    else:
        value.frombytes(content)


def _torch_generators() -> tuple[torch.Generator, ...]:
    on_cuda = torch.cuda.default_generators  # none before the first use
    return (torch.default_generator, *on_cuda)


def users_classes(modules: Iterable[nn.Module]) -> list[type]:
    """The classes that modules are of, and those they inherit from, but for torch's."""
    kinds: set[Any] = {type(module) for module in modules}
    return list({own for kind in kinds for own in _of_user(kind)[1]})


@lru_cache(maxsize=1024)
def _of_user(kind: Any) -> tuple[tuple[str, ...], tuple[type, ...]]:
    """Slots of a class of modules, and the classes among those it inherits from that a user wrote.

    Few: torch's own are asked for most of the time.
    """
    own = [k for k in kind.__mro__ if k.__module__.partition(".")[0] not in _LIBRARIES]
    return (slots_of(kind) if own else ()), tuple(own)


@lru_cache(maxsize=1024)
def slots_of(kind: Any) -> tuple[str, ...]:
    """Names of the attributes that objects of a class have no dict for."""
    found: list[str] = []
    for own in kind.__mro__:
        slots = vars(own).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        private = own.__name__.lstrip("_")
        for name in names:
            hidden = name.startswith("__") and not name.endswith("__")
            found.append(f"_{private}{name}" if hidden else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _is_followed(kind: type) -> bool:
    """Whether objects of a class hold a user's state: not those of torch or of Python itself."""
    root = kind.__module__.partition(".")[0]
    if root == "torch":
        return kind.__module__.startswith("torch.optim")
    return root in _FOLLOWED or root not in sys.stdlib_module_names


def _name_in(owner: Owner, key: str, paths: Mapping[int, str]) -> str:
    """How a piece of state is called: its kind and its name."""
    module, attribute = owner
    name = key or attribute
    kind = "attribute"
    if name in module._parameters:
        kind = "parameter"
    elif name in module._buffers:
        kind = "buffer"
    path = paths.get(id(module), "")
    return f"{kind} '{path + '.' if path else ''}{name}'"

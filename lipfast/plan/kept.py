"""What a module holds, kept while its forward runs: forward may write to all of it.

Followed are modules, tensors, plain containers and other objects, as far as the module leads to
them. Contents of tensors are copied: neither version counters nor dispatch see what goes through
`Tensor.data` or numpy. What lies in the closures of functions and in other libraries is not kept.
"""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipfast.plan.kept_values import (
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
_SOURCES = (torch.Generator, random.Random, np.random.BitGenerator, np.random.RandomState)
_KINDS_KEPT = frozenset((dict, OrderedDict, list, set))
# These layers list their parameters anew whenever they are given others.
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
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
            self._push((value.__self__,), owner, depth)
        elif isinstance(value, np.ndarray):
            self._kept.append(KeptState(value, owner, value.copy, partial(np.copyto, value)))
        elif isinstance(value, random.Random):
            self._kept.append(KeptState(value, owner, value.getstate, value.setstate))
        elif isinstance(value, torch.Generator):
            self._kept.append(KeptGenerator(value, owner))
        elif isinstance(value, np.random.Generator):
            self._kept.append(_bit_generator(value.bit_generator, owner))
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
            elif kind not in _ATOMS:
                pending.append((value, (module, name), 0))
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
        if table:
            inside.append(table)
        elif table is not None:
            self._empty.append(table)
        if inside:
            self._push(inside, owner, depth)

    def _object(self, value: Any, owner: Owner, depth: int) -> None:
        if isinstance(getattr(value, "__dict__", None), dict):
            self._table(vars(value), owner, depth)
        for name in (slot for kind in type(value).__mro__ for slot in _slots(kind)):
            with suppress(AttributeError):  # not set yet
                read, write = partial(getattr, value, name), partial(setattr, value, name)
                self._kept.append(KeptSlot(value, owner, read, write))
                self._push((read(),), owner, depth)

    def computed(self) -> list[Tensor]:
        """Tensors that hang on a graph: results of autograd that the module holds on to."""
        tensors = (kept.value for kept in self._kept if isinstance(kept, KeptTensor))
        return [tensor for tensor in tensors if not tensor.is_leaf]

    def keep_generators(self) -> None:
        """Keep the generators of Python and numpy that belong to the process, too."""
        owner = (self._root, "")
        source = np.random.mtrand._rand
        self._generators = (
            KeptState(random, owner, random.getstate, random.setstate),
            KeptState(source, owner, source.get_state, source.set_state),
        )

    def restore(self) -> None:
        """Put everything back; a Ctrl-C meanwhile counts afterwards."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._restore()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _restore(self) -> None:
        if any(self._empty):
            for container in self._empty:
                container.clear()
        for kept in self._kept:
            if kept.differs():
                with torch.no_grad():
                    kept.restore()

    def restore_generators(self) -> bool:
        """Put back the generators of the process; whether they had moved."""
        moved = [generator for generator in self._generators if generator.differs()]
        for generator in moved:
            generator.restore()
        return bool(moved)

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
            if isinstance(kept, KeptTable) and kept.owner[1] in ("", "_parameters", "_buffers"):
                derived = _DERIVED if type(kept.owner[0]) in _RECURRENT else ()
                for name in kept.names():
                    if name in derived:
                        continue
                    found[_name_in(kept.owner, name, paths)] = snapshot(kept.value.get(name))
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


def _bit_generator(generator: Any, owner: Owner) -> KeptState:
    source = generator if hasattr(generator, "state") else generator._bit_generator
    return KeptState(
        source, owner, lambda: source.state, lambda state: setattr(source, "state", state)
    )


def _torch_generators() -> tuple[torch.Generator, ...]:
    on_cuda = torch.cuda.default_generators  # none before the first use
    return (torch.default_generator, *on_cuda)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _is_followed(kind: type) -> bool:
    """Whether objects of a class hold a user's state: not those of torch or of Python itself."""
    root = kind.__module__.partition(".")[0]
    if root == "torch":
        return kind.__module__.startswith("torch.optim")
    return root in ("types", "argparse", "__main__") or root not in sys.stdlib_module_names


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

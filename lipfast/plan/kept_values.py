"""Values of each kind, as they were: where they lie, what they hold, and how to put it back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SIZES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = {
    dtype: _SIZES[dtype.itemsize]
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    )
}
_LARGE = 4096
# The module that leads to a value, and under which attribute.
Owner = tuple[nn.Module, str]


class KeptTensor:
    """A tensor: where it lies, its bits, its gradient and its flags."""

    __slots__ = (
        "alias",
        "bits",
        "copy",
        "grad",
        "hooks",
        "leaf",
        "owner",
        "requires_grad",
        "size",
        "storage",
        "value",
    )

    def __init__(self, tensor: Tensor, owner: Owner) -> None:
        self.value, self.owner = tensor, owner
        self.alias = tensor.data  # with a version counter of its own
        self.leaf, self.requires_grad = tensor.is_leaf, tensor.requires_grad
        self.grad = tensor.grad if self.leaf else None
        self.hooks: Any = tensor._backward_hooks
        self.bits = _in_words(_bits(self.alias))
        self.copy = None if self.bits is None else self.bits.clone()
        self.storage = None if self.bits is None else self.bits.untyped_storage()
        self.size = 0 if self.storage is None else self.storage.nbytes()

    def moved(self) -> bool:
        """Whether it lies elsewhere, or has other flags or another gradient."""
        tensor = self.value
        if tensor.is_leaf is not self.leaf or tensor.requires_grad is not self.requires_grad:
            return True
        if self.leaf and tensor.grad is not self.grad:
            return True
        if tensor._backward_hooks is not self.hooks:
            return True
        return self.bits is not None and not self._in_place()

    def _in_place(self) -> bool:
        """Whether it has its own place in memory, and its shape there."""
        tensor, alias = self.value, self.alias
        if tensor.dtype is not alias.dtype:
            return False
        if alias.dtype in _BITS:
            return tensor.is_set_to(alias)
        same = tensor.shape == alias.shape and tensor.stride() == alias.stride()
        return same and tensor.data_ptr() == alias.data_ptr()

    def overwritten(self) -> bool:
        """Whether there are other bits where it lay."""
        if self.bits is None or self.copy is None or self.storage is None:
            return False
        return self.storage.nbytes() != self.size or not torch.equal(self.bits, self.copy)

    def differs(self) -> bool:
        """Whether it is not what it was."""
        return self.moved() or self.overwritten()

    def rewritten(self) -> bool:
        """Whether its numbers are others, or elsewhere: not only its gradient or flags."""
        if self.bits is None:
            return False
        return self.overwritten() or not self._in_place()

    def restore(self) -> None:
        """Make it what it was; nothing is written where nothing was."""
        tensor, bits, copy = self.value, self.bits, self.copy
        if bits is not None and copy is not None and self.overwritten():
            if bits.untyped_storage().nbytes() != self.size:
                bits.untyped_storage().resize_(self.size)
            with torch.inference_mode(bits.is_inference()):
                bits.copy_(copy)
        if not self.moved():
            return
        if self.leaf and not tensor.is_leaf:
            tensor.detach_()
        if bits is not None:
            tensor.data = self.alias
        if self.leaf:
            tensor.requires_grad_(self.requires_grad)
            tensor.grad = self.grad
        if tensor._backward_hooks is not self.hooks:
            tensor._backward_hooks = self.hooks


def _bits(tensor: Tensor) -> Tensor | None:
    """The memory of a tensor as integers; None where it has none that can be written to."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    with suppress(RuntimeError, NotImplementedError, AttributeError):  # without a storage
        kind, storage = _BITS.get(tensor.dtype), tensor.untyped_storage()
        end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
        # There is less memory than entries once a storage was resized to nothing.
        plain = not tensor.is_neg() and not tensor.is_conj()  # else it is seen other than it lies
        if kind is not None and plain and tensor.is_contiguous() and end <= storage.nbytes():
            return tensor.view(kind)
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    return None


def _in_words(bits: Tensor | None) -> Tensor | None:
    """Memory as integers of eight bytes, which compare fastest, if it is large and made of them."""
    if bits is None or bits.numel() < _LARGE:
        return bits
    each = 8 // bits.itemsize
    whole = bits.numel() % each == 0 and bits.storage_offset() % each == 0
    return bits.flatten().view(torch.int64) if whole else bits


class KeptTable:
    """A dict, and which objects it holds under which names."""

    __slots__ = ("keys", "owner", "value", "values")

    def __init__(self, table: dict[Any, Any], owner: Owner) -> None:
        self.value, self.owner = table, owner
        self.keys, self.values = tuple(table), tuple(table.values())

    def differs(self) -> bool:
        """Whether it is not what it was."""
        table = self.value
        return (
            len(table) != len(self.keys)
            or any(map(is_not, table.values(), self.values))
            or tuple(table) != self.keys
        )

    def restore(self) -> None:
        """Make it what it was; `update` of a Counter counts, and a user's may do anything."""
        kind: Any = OrderedDict if isinstance(self.value, OrderedDict) else dict
        kind.clear(self.value)
        for key, value in zip(self.keys, self.values, strict=True):
            kind.__setitem__(self.value, key, value)

    def names(self) -> list[str]:
        """Keys whose values are others now."""
        before, now = dict(zip(self.keys, self.values, strict=True)), self.value
        missing = object()
        every = [*before, *(key for key in now if key not in before)]
        return [str(k) for k in every if before.get(k, missing) is not now.get(k, missing)]


class KeptSequence:
    """A list, deque or set."""

    def __init__(self, values: Any, owner: Owner) -> None:
        self.value, self.owner, self.copy = values, owner, tuple(values)

    def differs(self) -> bool:
        """Whether it is not what it was."""
        return len(self.value) != len(self.copy) or any(map(is_not, self.value, self.copy))

    def restore(self) -> None:
        """Make it what it was."""
        self.value.clear()
        (self.value.update if isinstance(self.value, set) else self.value.extend)(self.copy)


class KeptGenerator:
    """A generator of torch."""

    __slots__ = ("owner", "state", "value")

    def __init__(self, generator: torch.Generator, owner: Owner) -> None:
        self.value, self.owner, self.state = generator, owner, generator.get_state()

    def differs(self) -> bool:
        """Whether it is not what it was."""
        return not torch.equal(self.value.get_state(), self.state)

    def restore(self) -> None:
        """Make it what it was."""
        self.value.set_state(self.state)


class KeptState:
    """What has a state that is read and set as one: arrays, generators."""

    def __init__(
        self, value: Any, owner: Owner, read: Callable[[], Any], write: Callable[[Any], object]
    ) -> None:
        self.value, self.owner = value, owner
        self._read, self._write, self._state = read, write, read()

    def differs(self) -> bool:
        """Whether it is not what it was."""
        return not alike(self._read(), self._state)

    def restore(self) -> None:
        """Make it what it was."""
        self._write(self._state)


class KeptSlot:
    """An attribute that an object has no dict for.

    Attributes:
        found: what it was, in a tuple; an empty one if it was not set.
    """

    __slots__ = ("_name", "found", "owner", "value")

    def __init__(self, value: Any, name: str, owner: Owner) -> None:
        self.value, self._name, self.owner = value, name, owner
        self.found = self.now()

    def now(self) -> tuple[Any, ...]:
        """What it is, in a tuple."""
        try:
            return (object.__getattribute__(self.value, self._name),)
        except AttributeError:
            return ()

    def differs(self) -> bool:
        """Whether it is not what it was."""
        now = self.now()
        return len(now) != len(self.found) or any(map(is_not, now, self.found))

    def restore(self) -> None:
        """Make it what it was."""
        if self.found:  # what a class does when it is set is no part of putting it back
            object.__setattr__(self.value, self._name, *self.found)
        else:
            object.__delattr__(self.value, self._name)


class KeptClass:
    """A class, and which objects its attributes are."""

    __slots__ = ("_names", "_values", "owner", "value")

    def __init__(self, kind: type, owner: Owner) -> None:
        self.value, self.owner = kind, owner
        self._names, self._values = tuple(vars(kind)), tuple(vars(kind).values())

    def differs(self) -> bool:
        """Whether it is not what it was."""
        now = vars(self.value)
        same = len(now) == len(self._names) and not any(map(is_not, now.values(), self._values))
        return not same and bool(self.names())

    def restore(self) -> None:
        """Make it what it was."""
        before = dict(zip(self._names, self._values, strict=True))
        for name in self.names():
            if name in before:
                type.__setattr__(self.value, name, before[name])
            else:
                type.__delattr__(self.value, name)

    def names(self) -> list[str]:
        """Attributes that are others now; not what Python writes there, as ``__slotnames__``."""
        before, now = dict(zip(self._names, self._values, strict=True)), vars(self.value)
        missing = object()
        every = (name for name in dict.fromkeys((*before, *now)) if not name.startswith("__"))
        return [k for k in every if before.get(k, missing) is not now.get(k, missing)]


def alike(first: Any, second: Any) -> bool:
    """Equal, tensors and arrays by their bits."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(alike(v, second[k]) for k, v in first.items())
    both = (first, second)
    # The tuple of Python's generator holds 625 numbers.
    if all(isinstance(value, (list, tuple)) for value in both) and len(first) != 625:
        return len(first) == len(second) and all(map(alike, first, second))
    if all(isinstance(value, Tensor) for value in both):
        return _same_bits(first, second)
    if any(isinstance(value, (Tensor, np.ndarray)) for value in both):
        same = type(first) is type(second) and first.shape == second.shape
        return same and first.dtype == second.dtype and first.tobytes() == second.tobytes()
    return first is second or bool(first == second)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.shape, first.dtype, first.layout) != (second.shape, second.dtype, second.layout):
        return False
    if not (_has_memory(first) and _has_memory(second)):
        return False
    if first.layout is not torch.strided:
        return all(map(_same_bits, strided_parts(first), strided_parts(second)))
    bits = [
        _bits(value.detach().resolve_conj().resolve_neg().contiguous()) for value in (first, second)
    ]
    return bits[0] is not None and bits[1] is not None and torch.equal(bits[0], bits[1])


def _has_memory(tensor: Tensor) -> bool:
    """Whether there is something to read: not after its storage was resized to nothing."""
    with suppress(RuntimeError, NotImplementedError):
        needed = tensor.numel() and 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        end = (needed + tensor.storage_offset()) * tensor.element_size() if needed else 0
        return tensor.untyped_storage().nbytes() >= end
    return True  # without a storage


def strided_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Where the numbers of a tensor lie: indices and values of a sparse one."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return ()  # of another library


def snapshot(value: Any) -> Any:
    """A copy that later writes do not reach, to compare with another."""
    if isinstance(value, Tensor):
        return value.detach().clone() if _has_memory(value) else None
    if isinstance(value, Mapping):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return tuple(map(snapshot, value))
    return value.copy() if isinstance(value, (np.ndarray, set)) else value

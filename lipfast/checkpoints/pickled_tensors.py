"""Tensors in pickles: views of a file's bytes, made from what the pickle says of their storages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lipfast.checkpoints.pickles import Maker, PickleReader
from lipfast.checkpoints.stand_ins import Global, NoTensor

Buffer: TypeAlias = Any
"""Bytes that can be written to: a bytearray, or a private mapping of the file."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    **dict.fromkeys(["QInt8Storage"], torch.int8),
    **dict.fromkeys(["QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"], torch.uint8),
    "QInt32Storage": torch.int32,
}
_DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_MAX_ELEMENTS = 1 << 62  # of a view, which may repeat what it holds
_MAX_INDICES = 64  # of a tensor: as those of numpy


class _View(NamedTuple):
    """A tensor that waits for the bytes of its storage."""

    tensor: Tensor
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Storage:
    """A storage that a pickle names.

    Attributes:
        dtype: of its elements.
        count: how many the pickle says it has.
    """

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        if not are_counts((count,)):
            raise ValueError("a storage of no length")
        self.dtype = dtype
        self.count = count
        self._flat: dict[torch.dtype, Tensor] = {}
        self._copy: Tensor | None = None  # one for all dtypes
        self._place: tuple[Buffer, int, int] | None = None
        self._read: Callable[[int, int], None] = _nothing_to_read
        self._waiting: list[_View] = []
        self._parts: list[tuple[int, Storage]] = []

    @property
    def length(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize

    @property
    def attached(self) -> bool:
        """Whether its bytes are there."""
        return self._place is not None

    def part(self, offset: int, count: int) -> Storage:
        """A storage that shares the bytes of this one, which are attached to both."""
        if not are_counts((offset, count)) or offset + count > self.count:
            raise ValueError("a part that leaves its storage")
        part = Storage(self.dtype, count)
        self._parts.append((offset * self.dtype.itemsize, part))
        return part

    def attach(
        self,
        buffer: Buffer,
        start: int,
        *,
        swapped: bool = False,
        read: Callable[[int, int], None] | None = None,
    ) -> None:
        """Say where its bytes are; tensors that wait for them are filled.

        Args:
            buffer: that holds them.
            start: where they begin.
            swapped: the bytes of each number are in the other order.
            read: reads a part of the file into the buffer, where that is still to be done. It is
                called here for what is copied and for single numbers, the metadata.

        Raises:
            ValueError: it ends before the storage does.
        """
        length = self.length
        if start + length > len(buffer):
            raise ValueError(f"a storage of {length} bytes where the file has fewer")
        width = self.dtype.itemsize // (2 if self.dtype.is_complex else 1)
        if swapped and width > 1:
            if read is not None:
                read(start, length)
                read = None
            turned = torch.frombuffer(buffer, dtype=torch.uint8, count=length, offset=start)
            buffer, start = bytearray(turned.reshape(-1, width).flip(1).numpy().tobytes()), 0
        self._place, self._read = (buffer, start, length), read or _nothing_to_read
        for shift, part in self._parts:
            part.attach(buffer, start + shift, read=read)
        for view in self._waiting:
            view.tensor.data = self._view(view)
        self._waiting.clear()

    def tensor(self, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
        """A view; of a storage without its bytes one that is filled later.

        Raises:
            Exception: it leaves the storage.
        """
        if (
            type(size) is not tuple
            or type(stride) is not tuple
            or len(size + stride) > _MAX_INDICES
        ):
            raise TypeError("a tensor without a size")
        if not are_counts((offset, *size, *stride)) or math.prod(size) > _MAX_ELEMENTS:
            raise ValueError("a tensor of no size, or of more elements than can be counted")
        view = _View(torch.empty(0), dtype, offset, tuple(size), tuple(stride))
        if self._place is not None:
            return self._view(view)
        self._waiting.append(view)
        return view.tensor

    def _view(self, view: _View) -> Tensor:
        flat = self._flat.get(view.dtype)
        if flat is None:
            flat = self._flat[view.dtype] = self._as(view.dtype)
        if not view.size and self._place is not None:
            self._read(*self._place[1:])
        return flat.as_strided(view.size, view.stride, view.offset)

    def _as(self, dtype: torch.dtype) -> Tensor:
        assert self._place is not None
        buffer, start, length = self._place
        count = length // dtype.itemsize
        if not count:
            return torch.empty(0, dtype=dtype)
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=length, offset=start)
        if raw.data_ptr() % dtype.itemsize:
            # Numbers between their places crash in vectorised code; the older format has them.
            self._read(start, length)
            self._copy = raw = raw.clone() if self._copy is None else self._copy
        return raw[: count * dtype.itemsize].view(dtype)


def _nothing_to_read(start: int, length: int) -> None:
    pass


def are_counts(values: tuple[Any, ...]) -> bool:
    """Whether values are whole numbers as sizes, strides and offsets may be."""
    return not values or (
        set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _MAX_ELEMENTS
    )


def storage_type(kind: object) -> torch.dtype:
    """The dtype of a storage's class.

    Raises:
        ValueError: there is no such class.
    """
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    if name not in _STORAGES:
        raise ValueError("a storage of an unknown type")
    return _STORAGES[name]


def _tensor(
    reader: PickleReader, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> Tensor | NoTensor:
    return _strided(reader, storage, (offset, size, stride), None, rest[2:])


def _tensor_with_dtype(
    reader: PickleReader, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> Tensor | NoTensor:
    _requires_grad, _hooks, kind, *metadata = rest
    return _strided(reader, storage, (offset, size, stride), _DTYPES[kind.name], metadata)


def _strided(
    reader: PickleReader, storage: Any, view: Any, dtype: torch.dtype | None, metadata: Any
) -> Tensor | NoTensor:
    if metadata and metadata[0]:
        return NoTensor("a tensor that is negated or conjugated when it is used")
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    reader.allowance.count_tensor()
    return storage.tensor(dtype or storage.dtype, *view)


def _of_type(reader: PickleReader, function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor of a subclass: a plain one where it is made as those are."""
    plain: dict[str, Maker] = {
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
        "torch._utils._rebuild_parameter": _data_of,
    }
    make = plain.get(function.name) if isinstance(function, Global) else None
    if make is None or "distributed" in kind.name:
        return _of_kind(f"a {kind.name.rpartition('.')[2]}")(reader)
    return make(reader, *args)


def _data_of(reader: PickleReader, data: Any, *_: Any) -> Any:
    return data


def _of_device(reader: PickleReader, data: Any, *_: Any) -> Any:
    """A tensor of a device such as XLA's, saved as its copy on the CPU."""
    return data


def _of_kind(kind: str) -> Maker:
    return lambda reader, *_: NoTensor(kind)


_UTILS = "torch._utils._rebuild_"

TENSORS: Mapping[str, Maker] = {
    f"{_UTILS}tensor": _tensor,
    f"{_UTILS}tensor_v2": _tensor,
    f"{_UTILS}tensor_v3": _tensor_with_dtype,
    f"{_UTILS}parameter": _data_of,
    f"{_UTILS}parameter_with_state": _data_of,
    "torch.nn.parameter.Parameter": _data_of,
    "torch.storage.TypedStorage": _data_of,
    "torch._dynamo.eval_frame.OptimizedModule": _data_of,  # of torch.compile: the module in it
    f"{_UTILS}device_tensor_from_numpy": _of_device,
    f"{_UTILS}device_tensor_from_cpu_tensor": _of_device,
    f"{_UTILS}xla_tensor": _of_device,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    f"{_UTILS}sparse_tensor": _of_kind("a sparse tensor"),
    f"{_UTILS}sparse_csr_tensor": _of_kind("a sparse tensor"),
    f"{_UTILS}qtensor": _of_kind("a quantized tensor"),
    f"{_UTILS}nested_tensor": _of_kind("a nested tensor"),
    "torch.nested._internal.nested_tensor._rebuild_njt": _of_kind("a nested tensor"),
    f"{_UTILS}meta_tensor_no_storage": _of_kind("a tensor on the device 'meta', without numbers"),
    f"{_UTILS}wrapper_subclass": _of_kind("a tensor of a class of its own"),
}
"""Known names, as `module.name`, to the call that makes their tensor."""

"""Calls in pickles that give plain values: numbers, texts, dicts, arrays of numpy.

Each is called with the reader and what the pickle passes; what does not fit becomes a stand-in.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipfast.checkpoints.pickles import Maker, PickleReader
from lipfast.checkpoints.stand_ins import StandIn, UnsafePickleError

_DTYPE = re.compile(r"[biufcSU]\d{1,6}")
_MAX_PATH = 1 << 16  # characters of a path
_MAX_NUMBER = 1 << 12  # bytes of one number or text of numpy
MAX_DIMS = 64
"""Dimensions of an array, as numpy limits them."""

_MAX_SIDE = 1 << 60


def _forgiving(name: str, make: Maker) -> Maker:
    """Where the arguments are others than expected, a stand-in: the value is not a weight."""

    @functools.wraps(make)
    def call(reader: PickleReader, *args: Any) -> Any:
        try:
            return make(reader, *args)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError):
            return StandIn(name, args)

    return call


def _mapping(reader: PickleReader, content: Any = (), *_: Any) -> dict[Any, Any]:
    """An OrderedDict, a Counter or a dict, given as a dict or as pairs."""
    if isinstance(content, dict):
        return content
    reader.allowance.spend(len(content))
    return {reader.key(key): value for key, value in content}


def _encoded(reader: PickleReader, text: str, encoding: str = "utf-8", *_: Any) -> bytes:
    """Bytes, as protocol 2 writes them."""
    reader.allowance.spend(len(text))
    return text.encode("latin-1" if encoding in ("latin1", "latin-1") else "utf-8")


def _byte_array(reader: PickleReader, content: Any = b"", *_: Any) -> Any:
    if isinstance(content, int):
        raise UnsafePickleError("it makes byte arrays, which are no weights")
    return StandIn("builtins.bytearray")


def _path(reader: PickleReader, *parts: str) -> str:
    reader.allowance.spend(sum(map(len, parts)))
    if sum(map(len, parts)) > _MAX_PATH:
        raise ValueError("a path of more characters than any file system allows")
    return "/".join(parts).replace("//", "/")


def _moment(kind: Any) -> Maker:
    def call(reader: PickleReader, *args: Any) -> str:
        (data,) = args  # another argument is the time zone, an object
        return str(kind(_raw(reader, data, _MAX_NUMBER)).isoformat())

    return call


def _raw(reader: PickleReader, data: Any, limit: int | None = None) -> bytes:
    """Bytes, which Python 2 wrote as text. Of a tensor `bytes` would make as many as it says."""
    if type(data) not in {str, bytes, bytearray}:
        raise TypeError("no bytes")
    if limit is not None and len(data) > limit:
        raise ValueError("more bytes than a number has")
    reader.allowance.spend(len(data))
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)


# numpy


def dtype_of(stand_in: Any) -> np.dtype[Any]:
    """The dtype that a stand-in of one describes.

    Raises:
        ValueError: it is none of numbers or texts.
    """
    if not isinstance(stand_in, StandIn) or stand_in.name != "numpy.dtype":
        raise ValueError("no dtype")
    text = stand_in.args[0]
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise ValueError("a dtype of no numbers")
    state = stand_in.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    return np.dtype(text).newbyteorder(">" if order == ">" else "<")


def _scalar_of_numpy(reader: PickleReader, dtype: Any, data: Any) -> Any:
    kind = dtype_of(dtype)
    raw = _raw(reader, data, _MAX_NUMBER)
    if len(raw) != kind.itemsize:
        raise ValueError("a number of another length than its dtype")
    return np.frombuffer(raw, kind)[0].item()


def _array(
    reader: PickleReader, dtype: Any, shape: Any, data: Any, *, by_column: bool = False
) -> Tensor:
    """A tensor of the numbers of an array; lists of objects and texts are none."""
    kind = dtype_of(dtype)
    raw = _raw(reader, data)
    is_shape = type(shape) is tuple and len(shape) <= MAX_DIMS
    if not is_shape or not all(type(n) is int and 0 <= n < _MAX_SIDE for n in shape):
        raise ValueError("no shape")
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError("an array of another length than its shape")
    flat = (np.frombuffer(raw, kind) if raw else np.empty(0, kind)).astype(
        kind.newbyteorder("=")
    )  # a copy, which is writable
    tensor = torch.from_numpy(flat.reshape(shape, order="F" if by_column else "C"))
    reader.allowance.count_tensor()
    return tensor


def _array_with_state(reader: PickleReader, array: StandIn) -> Any:
    try:
        _version, shape, dtype, by_column, data = array.state
        return _array(reader, dtype, shape, data, by_column=bool(by_column))
    except (TypeError, ValueError):
        return array


def _array_of_buffer(
    reader: PickleReader, data: Any, dtype: Any, shape: Any, order: str = "C"
) -> Tensor:
    return _array(reader, dtype, shape, data, by_column=order == "F")


_PLAIN_CALLS: Mapping[str, Maker] = {
    **dict.fromkeys(
        ["collections.OrderedDict", "collections.Counter", "builtins.dict"],
        _mapping,
    ),
    "collections.defaultdict": lambda reader, *_: {},
    **dict.fromkeys(
        ["builtins.set", "builtins.frozenset", "builtins.list", "torch.Size", "builtins.tuple"],
        lambda reader, items=(): items,
    ),
    "builtins.bytearray": _byte_array,
    "builtins.bytes": lambda reader: b"",  # none, as protocol 2 writes them
    "_codecs.encode": _encoded,
    **dict.fromkeys(
        [
            f"pathlib{private}.{kind}"
            for private in ("", "._local")
            for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path")
        ],
        _path,
    ),
    "datetime.datetime": _moment(datetime),
    "datetime.date": _moment(date),
    "datetime.time": _moment(time),
    "numpy.core.multiarray.scalar": _scalar_of_numpy,
    "numpy.core.numeric._frombuffer": _array_of_buffer,
}

VALUES: Mapping[str, Maker] = {
    **{name: _forgiving(name, make) for name, make in _PLAIN_CALLS.items()},
    "numpy.core.multiarray._reconstruct": lambda reader, *_: StandIn("numpy.ndarray"),
    "numpy.ndarray.__setstate__": _array_with_state,
    "numpy.dtype": lambda reader, *args: StandIn("numpy.dtype", args or ("",)),
}
"""Known names, as `module.name`, to the call that makes their value."""

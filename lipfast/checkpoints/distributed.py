"""Read folders of `torch.distributed.checkpoint`: an index, and files that hold slices of tensors.

The index (`.metadata`) is a pickle. It is read with stand-ins: nothing that it names is imported or
run, and only what the stand-ins were told is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from torch import Tensor

from lipfast.checkpoints.access import read_bytes, read_range
from lipfast.checkpoints.content import HEAD, foreign
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.names import COMPANIONS, SLICES
from lipfast.checkpoints.pickles import Allowance, PickleReader
from lipfast.checkpoints.scalars import scalars
from lipfast.checkpoints.stand_ins import StandIn
from lipfast.checkpoints.torch_file import collected, load_harmless
from lipfast.checkpoints.wrapped import Content, is_state
from lipfast.errors import CheckpointError, NotWeightsError

_MAX_PICKLED_INDEX = 16 << 20  # bytes
_MAX_COMPANION = 16 << 20  # bytes
_MAX_SCALAR = 1 << 16  # bytes of a pickled number
_MAX_SPARE = 64  # a tensor takes its bytes once; hostile sizes are refused far above that


@dataclass(frozen=True)
class _Slice:
    """Where a part of an entry lies, in which file, and where it belongs in its tensor."""

    file: str
    start: int
    length: int
    offsets: tuple[int, ...] | None


def read_distributed(file: CheckpointFile) -> Content:
    """Read the weights of a folder that `torch.distributed.checkpoint.save` wrote.

    Slices of all ranks are put together; states of optimizers are not read.

    Raises:
        NotWeightsError: it is the state of an optimizer.
        CheckpointError: the index is malformed, or a slice is missing or not what the index says.
        OSError: a file cannot be read.
    """
    index = _unpickled(file)
    try:
        entries = dict(_described(file, index))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _malformed(file, f"{type(error).__name__}: {error}") from error
    if not entries and index.attributes["state_dict_metadata"]:
        raise NotWeightsError(f"{file.uri}: holds the state of an optimizer, no weights")
    folder = _Folder(file)
    content: dict[str, Any] = {}
    for path, (size, slices) in entries.items():
        value = folder.scalar(slices) if size is None else folder.tensor(path, size, slices)
        level: Any = content
        for key in path[:-1]:
            level = level.setdefault(key, {})
            if not isinstance(level, dict):
                raise _malformed(file, f"'{'.'.join(path)}' lies below a tensor")
        level[path[-1]] = value
    found = collected(file, content)
    return found._replace(raw={**_beside(file), **found.raw})


def _unpickled(file: CheckpointFile) -> StandIn:
    data = read_bytes(file, file.path, _MAX_PICKLED_INDEX)
    try:
        index = PickleReader({}, _nothing_outside, Allowance(len(data))).read(BytesIO(data))
    except Exception as error:  # a damaged pickle can fail in any way
        what = foreign(data[:HEAD], len(data))
        if what is not None:
            raise CheckpointError(f"{file.uri}: {what}") from error
        raise _malformed(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(index, StandIn) or not index.attributes:
        raise _malformed(file, "it holds something else")
    return index


def _nothing_outside(identity: Any) -> Any:
    raise ValueError("an index refers to nothing outside")


_Entry = tuple["tuple[int, ...] | None", list[_Slice]]


def _described(file: CheckpointFile, index: StandIn) -> Iterator[tuple[tuple[str, ...], _Entry]]:
    """Path in the state dict -> size of the tensor (None for other values) and its slices."""
    described = index.attributes["state_dict_metadata"]
    paths = index.attributes.get("planner_data") or {}
    slices: dict[str, list[_Slice]] = {}
    for key, place in index.attributes["storage_data"].items():
        name = key.attributes["fqn"]
        if not isinstance(name, str):  # others may take for ever to hash or to print
            raise ValueError("a slice without a name")
        if place.attributes.get("transform_descriptors"):
            raise CheckpointError(
                f"{file.uri}: '{name}' was transformed before it was stored, which lipfast "
                "does not undo. Save it with torch.distributed.checkpoint's defaults"
            )
        offset = _sizes(key.attributes.get("offset"))
        held = place.attributes
        where = (held["relative_path"], held["offset"], held["length"])
        if not (isinstance(where[0], str) and all(type(n) is int and n >= 0 for n in where[1:])):
            raise ValueError(f"no place of a slice of '{name}'")
        slices.setdefault(name, []).append(_Slice(*where, offset))
    for name, entry in described.items():
        keys = paths.get(name, (name,))
        if not all(type(key) in {str, int} for key in keys):
            raise ValueError("a path of no names")
        path = tuple(map(str, keys))
        if any(map(is_state, path[:-1])) or path[0].startswith("optimizer."):
            continue
        size = _sizes(entry.attributes["size"]) if entry.attributes else None
        yield path, (size, slices.get(name, []))


def _sizes(value: Any) -> tuple[int, ...] | None:
    """The numbers of a `torch.Size`."""
    if value is None:
        return None
    sizes = tuple(value.args[0] if isinstance(value, StandIn) and value.args else ())
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("no sizes")
    return sizes


class _Folder:
    """Reads slices of the files beside an index."""

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._left = 2 * file.size + _MAX_SCALAR  # bytes; an index may refer to one slice often

    def tensor(self, path: tuple[str, ...], size: tuple[int, ...], slices: list[_Slice]) -> Tensor:
        """Put the slices of a tensor together."""
        name = ".".join(path)
        whole: Tensor | None = None
        filled = 0
        if math.prod(size) > _MAX_SPARE + self._file.size:  # a number takes a byte or more
            raise _malformed(self._file, f"'{name}' of shape {size} is larger than all files")
        for one in slices:
            part = self._load(one)
            at = one.offsets if one.offsets is not None else (0,) * len(size)
            if not isinstance(part, Tensor) or not part.dim() == len(at) == len(size):
                raise _malformed(self._file, f"a slice of '{name}' is no part of shape {size}")
            if any(a + n > s for a, n, s in zip(at, part.shape, size, strict=True)):
                raise _malformed(self._file, f"a slice of '{name}' lies outside of shape {size}")
            if tuple(part.shape) == size and len(slices) == 1:
                return part
            if whole is None:
                whole = part.new_full(size, math.nan if part.is_floating_point() else 0)
            whole[tuple(slice(a, a + n) for a, n in zip(at, part.shape, strict=True))] = part
            filled += part.numel()
        if whole is None or filled != math.prod(size):
            raise _malformed(self._file, f"slices of '{name}' are missing, or overlap")
        return whole

    def scalar(self, slices: list[_Slice]) -> object:
        """The value of an entry that is no tensor; None where it is more than a number."""
        if len(slices) != 1 or slices[0].length > _MAX_SCALAR:
            return None
        try:
            return self._load(slices[0])
        except CheckpointError:  # an object: no metadata
            return None

    def _load(self, one: _Slice) -> Any:
        file = self._file
        if "/" in one.file or "\\" in one.file or "\0" in one.file or not one.file.endswith(SLICES):
            raise _malformed(file, f"a slice lies in {one.file!r:.200}, which is no file beside it")
        folder = file.path.rpartition("/")[0]
        path = f"{folder}/{one.file}" if folder else one.file
        self._left -= one.length
        if self._left < 0:
            raise _malformed(file, f"its slices are longer than its {file.size} bytes")
        try:
            data = read_range(file, path, one.start, one.length)
        except FileNotFoundError as error:
            raise CheckpointError(f"{file.uri}: its file '{one.file}' is missing") from error
        if len(data) < one.length:
            what = foreign(read_range(file, path, 0, HEAD), one.start + len(data))
            raise CheckpointError(
                f"{file.uri}: its file '{one.file}' is {what or 'truncated. Copy or save it again'}"
            )
        return load_harmless(file, path, len(data), data)


def _beside(file: CheckpointFile) -> Mapping[str, Any]:
    """Numbers and texts of the small files that trainers write beside the slices."""
    folder = file.path.rpartition("/")[0]
    found: dict[str, Any] = {}
    for name in COMPANIONS:
        path = f"{folder}/{name}"
        try:
            data = read_bytes(file, path, _MAX_COMPANION)
            content = load_harmless(file, path, len(data), data)
        except (OSError, CheckpointError):  # absent, or more than numbers: only metadata is lost
            continue
        if isinstance(content, Mapping):
            found |= scalars(content.items(), tensors=True)
    return found


def _malformed(file: CheckpointFile, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file.uri}: no index of torch.distributed.checkpoint that lipfast reads: {reason[:300]}. "
        "Convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
    )

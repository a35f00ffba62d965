"""Read `.safetensors` files: large local ones without a copy, small and remote ones at once."""

from __future__ import annotations

import json

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lipfast.checkpoints.access import read_bytes, read_range, require_regular
from lipfast.checkpoints.content import HEAD, foreign
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.file_memory import FileMemory
from lipfast.checkpoints.metadata import Scalar
from lipfast.errors import CheckpointError

SMALL = 1 << 20
"""Bytes; below it one read of the whole file is faster than one of its parts."""

_MAX_HEADER = 16 << 20  # bytes; parsed JSON takes many times as much
_EMPTY_HEADER = 2


def read_safetensors(
    file: CheckpointFile, path: str, size: int
) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Read the tensors and the metadata of one file.

    Args:
        file: the checkpoint, for messages and access.
        path: the file itself, or one of its shards.
        size: of `path`, as far as it is known.

    Raises:
        CheckpointError: it is truncated or not what the format allows.
        OSError: it cannot be read.
    """
    try:
        if file.filesystem is None and size > SMALL:
            return _read_large(file, path)
        data = read_bytes(file, path)
        return safetensors.torch.load(data), _header_metadata(file, data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        what = foreign(read_range(file, path, 0, HEAD), size)
        raise _damaged(file, str(error), what) from error


def _read_large(file: CheckpointFile, path: str) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    require_regular(file, path)
    with open(path, "rb") as stream:  # noqa: PTH123
        memory = FileMemory(file, stream)
        # which checks what the header says; of its mapping of the numbers nothing is looked at
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            views = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        memory.read_all()
        memory.require_unchanged(path)
    start = 8 + int.from_bytes(memory.buffer[:8], "little")
    if start > _MAX_HEADER:
        raise _damaged(file, f"its header has {start - 8} bytes")
    header = json.loads(memory.buffer[8:start])
    tensors = {}
    for name, view in views.items():
        first, last = header[name]["data_offsets"]
        flat = torch.empty(0, dtype=torch.uint8)
        if last > first:
            count, at = last - first, start + first
            flat = torch.frombuffer(memory.buffer, dtype=torch.uint8, count=count, offset=at)
        flat = flat.clone() if flat.data_ptr() % view.element_size() else flat
        tensors[name] = flat.view(view.dtype).view(view.shape)
    return tensors, metadata


def _header_metadata(file: CheckpointFile, data: bytes) -> dict[str, Scalar]:
    """Read the header's `__metadata__`: eight bytes of length, then that much JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not _EMPTY_HEADER <= length <= min(len(data) - 8, _MAX_HEADER):
        raise _damaged(file, f"its header does not fit into its {len(data)} bytes")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        return {}
    return {str(key): str(value) for key, value in metadata.items()}


def _damaged(file: CheckpointFile, reason: str, what: str | None = None) -> CheckpointError:
    return CheckpointError(
        f"{file.uri}: "
        + (what or f"truncated, or not a safetensors file: {reason[:300]}. Copy or save it again")
    )

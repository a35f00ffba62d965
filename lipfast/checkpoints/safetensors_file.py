"""Read `.safetensors` files: large local ones mapped, small and remote ones at once."""

from __future__ import annotations

import json

import safetensors
import safetensors.torch
from torch import Tensor

from lipfast.checkpoints.access import read_bytes, read_range
from lipfast.checkpoints.content import HEAD, foreign
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Scalar
from lipfast.errors import CheckpointError

SMALL = 1 << 20
"""Bytes; below it one read of the whole file is faster than a mapping."""

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
            with safetensors.safe_open(path, framework="pt") as opened:
                raw = opened.metadata() or {}
                # Views of the mapping: pages are read when they are used.
                return {name: opened.get_tensor(name) for name in opened.keys()}, dict(raw)  # noqa: SIM118
        data = read_bytes(file, path)
        return safetensors.torch.load(data), _header_metadata(file, data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        what = foreign(read_range(file, path, 0, HEAD), size)
        raise _damaged(file, str(error), what) from error


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

"""Bytes of a checkpoint's files, from wherever they are."""

from __future__ import annotations

import json
import os
import stat
import threading
from contextlib import nullcontext
from typing import Any

from fsspec import AbstractFileSystem

from lipfast.checkpoints.file import CheckpointFile
from lipfast.errors import CheckpointError

# What lies inside a tar file is read through one shared stream: one thread at a time.
_CONTAINERS = threading.Lock()

_MAX_RATIO = 100
_MIN_SUSPECT = 64 << 20  # bytes


def require_regular(file: CheckpointFile, path: str) -> None:
    """Refuse pipes and devices: reading one may wait for ever.

    Raises:
        CheckpointError: it is something else than a file.
    """
    if file.filesystem is None and not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        raise CheckpointError(f"{file.uri}: not a regular file, so it cannot be a checkpoint")


def require_no_bomb(file: CheckpointFile) -> None:
    """Refuse a compressed file that would grow out of all proportion: weights hardly compress.

    Raises:
        CheckpointError: it would take more than a hundred times the space.
    """
    if file.stored is not None and file.size > max(_MIN_SUSPECT, _MAX_RATIO * file.stored):
        raise CheckpointError(
            f"{file.uri}: {file.stored} bytes would become {file.size} when decompressed: not "
            "weights. Check where the file comes from"
        )


def read_bytes(file: CheckpointFile, path: str | None = None, limit: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        file: the checkpoint, which says where `path` is.
        path: of the checkpoint itself, of a shard or of a sidecar.
        limit: bytes at most.

    Raises:
        CheckpointError: it is longer than the limit.
        OSError: it cannot be read.
    """
    path = file.path if path is None else path
    count = None if limit is None else limit + 1
    if file.filesystem is None:
        require_regular(file, path)
        with open(path, "rb") as stream:  # noqa: PTH123 (fast)
            data = stream.read() if count is None else stream.read(count)
    else:
        data = _read_remote(file.filesystem, path, count, "::" in file.uri)
    if limit is not None and len(data) > limit:
        name = path.rpartition("/")[2]
        raise CheckpointError(f"{file.uri}: '{name}' is longer than {limit} bytes")
    return data


def read_range(file: CheckpointFile, path: str, start: int, length: int) -> bytes:
    """Read some bytes of a file; fewer where it ends before.

    Raises:
        OSError: it cannot be read.
    """
    if file.filesystem is not None:
        return _read_remote(file.filesystem, path, start + length, "::" in file.uri, start)
    require_regular(file, path)
    with open(path, "rb") as stream:  # noqa: PTH123 (fast)
        stream.seek(start)
        return stream.read(length)


def names_beside(file: CheckpointFile, levels: int = 1) -> list[str]:
    """List the names in the folder of a checkpoint, or further up; none where that is not possible.

    Args:
        file: the checkpoint.
        levels: 1 for its folder, 2 for the one above.
    """
    folder = file.path
    for _ in range(levels):
        folder = folder.rpartition("/")[0]
    try:
        if file.filesystem is None:
            return sorted(os.listdir(folder or "/"))  # noqa: PTH208 (fast)
        found = file.filesystem.ls(folder, detail=False)
    except Exception:  # each file system has errors of its own
        return []
    return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)


def read_json(file: CheckpointFile, path: str, limit: int, name: str) -> Any:
    """Read a JSON file, which messages call by a name.

    Raises:
        CheckpointError: it is longer than the limit, or not JSON.
        OSError: it cannot be read.
    """
    data = read_bytes(file, path, limit)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} not JSON: {str(error)[:200]}") from error


def _read_remote(
    filesystem: AbstractFileSystem,
    path: str,
    end: int | None,
    shared: bool,
    start: int | None = None,
) -> bytes:
    try:
        with _CONTAINERS if shared else nullcontext():
            return bytes(filesystem.cat_file(path, start=start, end=end))
    except OSError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error

"""Memory as long as a large file, into which those parts are read that are wanted."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Tensor

from lipfast.checkpoints.file import CheckpointFile
from lipfast.errors import CheckpointError, UnreachableError

_STEP = 1 << 26  # bytes of one read


class FileMemory:
    """Memory of a file's length; it takes pages where something is read into it.

    A mapping of the file would do the same, but ends the process where a trainer cuts the file off
    to write it anew, and gives numbers of two states of it.

    Args:
        file: the checkpoint, for messages.
        stream: the open file, or one of its parts, of a local disk.

    Attributes:
        buffer: the memory.

    Raises:
        CheckpointError: the file is empty.
    """

    def __init__(self, file: CheckpointFile, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._status = os.fstat(stream.fileno())
        if not self._status.st_size:
            raise CheckpointError(f"{file.uri}: truncated since it was listed: it is empty")
        self.buffer = _reserved(self._status.st_size)
        self._base = torch.frombuffer(self.buffer, dtype=torch.uint8).data_ptr()
        self._read: set[tuple[int, int]] = set()

    def read(self, start: int, length: int) -> None:
        """Read a part of the file to its place, once.

        Raises:
            CheckpointError: it ends before.
            OSError: it cannot be read.
        """
        if (start, length) in self._read:
            return
        at = self._stream.tell()
        self._stream.seek(start)
        with memoryview(self.buffer) as view:
            for place in range(start, start + length, _STEP):
                part = view[place : min(place + _STEP, start + length)]
                if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise CheckpointError(f"{self._file.uri}: truncated while it was read")
        self._stream.seek(at)
        self._read.add((start, length))

    def read_all(self) -> None:
        """Read the whole file."""
        self.read(0, len(self.buffer))

    def read_storages(self, tensors: Iterable[object]) -> None:
        """Read the numbers of those tensors that are views of the memory."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                start = storage.data_ptr() - self._base
                if storage.nbytes() and 0 <= start < len(self.buffer):
                    self.read(start, storage.nbytes())

    def require_unchanged(self, path: str | None = None) -> None:
        """Refuse what was read while the file was written anew.

        Args:
            path: of the file, where another one may have come into its place.

        Raises:
            UnreachableError: it was.
        """
        now = [os.fstat(self._stream.fileno()), *([os.stat(path)] if path is not None else [])]  # noqa: PTH116
        if any(_identity(one) != _identity(self._status) for one in now):
            raise UnreachableError(
                f"{self._file.uri}: it was written to while it was read. Try again later"
            )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reserved(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_NORESERVE"):
        return mmap.mmap(-1, size)
    # without a reservation: of the states of optimizers nothing is ever read
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
    return mmap.mmap(-1, size, flags=flags)

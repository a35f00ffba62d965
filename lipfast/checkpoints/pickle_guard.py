"""What a file of `torch.save` may do to memory, looked at before it is loaded.

`weights_only=True` keeps code from running, not memory from being used up: entries may be
compressed, a byte of a pickle may become an object of a hundred, and `bytearray(n)` is among the
calls that it allows.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections import deque
from typing import IO

ZIP = b"PK\x03\x04"

_MAX_PICKLE = 8 << 20  # bytes: some 40,000 tensors
_MAX_OPCODES = 2_000_000
_OWN = ("torch.", "collections.")
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


class UnsafePickleError(Exception):
    """Loading would take memory out of proportion."""


class PlainPickleError(Exception):
    """One pickle and nothing else, which torch.save never writes: says what it names."""


def require_harmless(stream: IO[bytes], size: int) -> None:
    """Refuse files whose loading would take memory out of proportion to their size.

    Args:
        stream: the file, at its start.
        size: its length.

    Raises:
        UnsafePickleError: says why.
        PlainPickleError: another program pickled something.
        Exception: the file is damaged.
    """
    if stream.read(len(ZIP)) == ZIP:
        _check_zip(stream, size)
    else:
        stream.seek(0)
        _check_legacy(stream)


def _check_zip(stream: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > size or any(entry.compress_type for entry in entries):
            raise UnsafePickleError(
                f"its entries are compressed or overlap ({total} bytes in a file of {size}), which "
                "torch.save never does"
            )
        for entry in entries:
            if not entry.filename.endswith(".pkl"):
                continue
            if entry.file_size > _MAX_PICKLE:
                raise UnsafePickleError(
                    f"its '{entry.filename}' has {entry.file_size} bytes beside the weights; "
                    f"expected at most {_MAX_PICKLE}"
                )
            if b"bytearray" in archive.read(entry):
                raise UnsafePickleError("it makes byte arrays, which are no weights")


def _check_legacy(stream: IO[bytes]) -> None:
    count = 0
    texts: deque[str] = deque(maxlen=2)
    named: list[str] = []
    for number in range(_LEGACY_PICKLES):
        if number == 1:
            start = stream.tell()
            if not stream.read(1):
                foreign = (name for name in named if not name.startswith(_OWN))
                raise PlainPickleError(next(foreign, "a plain pickle"))
            stream.seek(start)
        for opcode, argument, _position in pickletools.genops(stream):
            count += 1
            if opcode.name == "GLOBAL":
                named.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                named.append(".".join(texts))
            elif isinstance(argument, str):
                texts.append(argument)
            if count > _MAX_OPCODES:
                raise UnsafePickleError(f"its pickle has more than {_MAX_OPCODES} operations")
            if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                raise UnsafePickleError("it makes byte arrays, which are no weights")

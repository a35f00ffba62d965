"""The files that `torch.save` writes: zip archives, the older format, and plain pickles."""

from __future__ import annotations

import io
import zipfile
from typing import IO, Any

from lipfast.checkpoints.content import foreign_zip
from lipfast.checkpoints.pickled_tensors import TENSORS, Buffer, Storage, storage_type
from lipfast.checkpoints.pickled_values import VALUES
from lipfast.checkpoints.pickles import Allowance, PickleReader
from lipfast.checkpoints.stand_ins import (
    MoreThanWeightsError,
    OtherFormatError,
    UnsafePickleError,
)

ZIP = b"PK\x03\x04"

_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = 30  # bytes, before an entry's name


def read_container(stream: IO[bytes], buffer: Buffer) -> Any:
    """Read what was saved: dicts, lists, texts, numbers, tensors, and stand-ins for the rest.

    Args:
        stream: the file, at its start.
        buffer: the same bytes, which tensors are views of.

    Raises:
        OtherFormatError: it is an archive of another kind.
        UnsafePickleError: it would take memory or time out of proportion.
        MoreThanWeightsError: it was made to run code, or is a plain pickle without tensors.
        Exception: it is damaged.
    """
    if bytes(buffer[: len(ZIP)]) == ZIP:
        return _read_zip(stream, buffer)
    return _read_legacy(stream, buffer)


def _read_zip(stream: IO[bytes], buffer: Buffer) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        root = next(
            (e.filename[: -len("data.pkl")] for e in entries if e.filename.endswith("/data.pkl")),
            "",
        )
        wanted = {
            entry.filename.removeprefix(root): entry
            for entry in entries
            if entry.filename.startswith((f"{root}data", f"{root}byteorder"))
        }
        what = None if root else foreign_zip(entry.filename for entry in entries)
        if what is not None:
            raise OtherFormatError(what)
        total = sum(entry.file_size for entry in wanted.values())
        if total > len(buffer) or any(entry.compress_type for entry in wanted.values()):
            raise UnsafePickleError(
                f"its entries are compressed or overlap ({total} bytes in a file of "
                f"{len(buffer)}), which torch.save never does"
            )
        swapped = "byteorder" in wanted and archive.read(wanted["byteorder"]) == b"big"
        storages: dict[str, Storage] = {}

        def persistent(identity: Any) -> Any:
            (kind, key, _location, count) = _storage_of(identity)
            key = _plain(key)
            if key not in storages:
                entry, storage = wanted[f"data/{key}"], Storage(storage_type(kind), count)
                if storage.length > entry.file_size:
                    raise ValueError(f"a storage of {storage.length} bytes in {entry.file_size}")
                storage.attach(buffer, _start(entry, buffer), swapped=swapped)
                storages[key] = storage
            return storages[key]

        reader = PickleReader(_CALLS, persistent, Allowance(len(buffer)))
        return reader.read(io.BytesIO(archive.read(wanted["data.pkl"])))


def _storage_of(identity: object) -> tuple[Any, ...]:
    """What a persistent id says of a storage: its class, key, device, count and what else."""
    if type(identity) is not tuple or identity[0] != "storage":
        raise TypeError("a persistent id of no storage")
    return identity[1:]


def _plain(key: object) -> str:
    """The key of a storage. Other objects may take for ever to hash, or to print."""
    if type(key) is not str:
        raise TypeError("a storage whose key is no text")
    return key


def _start(entry: zipfile.ZipInfo, buffer: Buffer) -> int:
    """Where the bytes of a stored entry begin."""
    at = entry.header_offset
    lengths = buffer[at + _LOCAL_HEADER - 4 : at + _LOCAL_HEADER]
    return at + _LOCAL_HEADER + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))


def _read_legacy(stream: IO[bytes], buffer: Buffer, allowance: Allowance | None = None) -> Any:
    """Several pickles, then the storages one after the other; or one plain pickle."""
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        if type(identity) is tuple and identity[0] == "module":
            return identity[1]  # behind it is its source
        dtype, key, _location, count, *view = _storage_of(identity)
        key = _plain(key)
        storage = storages.setdefault(key, Storage(storage_type(dtype), count))
        if not view or view[0] is None:
            return storage
        view_key, offset, length = view[0]
        return storages.setdefault(_plain(view_key), storage.part(offset, length))

    calls = _CALLS if allowance else {**_CALLS, "torch.storage._load_from_bytes": _nested}
    reader = PickleReader(calls, persistent, allowance or Allowance(len(buffer)))
    content = reader.read(stream)
    if content != _MAGIC or type(content) is not int:
        if not reader.allowance.tensors:
            raise MoreThanWeightsError(reader.foreign or "a plain pickle")
        return content
    _version, system = reader.read(stream), reader.read(stream)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("numbers of the other byte order")
    content, keys = reader.read(stream), reader.read(stream)
    at = stream.tell()
    for key in keys:
        storage = storages[_plain(key)]
        count = int.from_bytes(buffer[at : at + 8], "little")
        if count != storage.count:
            raise ValueError(f"a storage of {count} elements where {storage.count} are named")
        storage.attach(buffer, at + 8)
        at += 8 + storage.length
    if not all(storage.attached for storage in storages.values()):
        raise EOFError("it ends too early: a storage is not there")
    return content


def _nested(reader: PickleReader, data: bytes) -> Any:
    """A storage inside a plain pickle: a whole file of torch.save."""
    reader.allowance.spend(len(data))
    return _read_legacy(io.BytesIO(data), bytearray(data), reader.allowance)


_CALLS = {**VALUES, **TENSORS}

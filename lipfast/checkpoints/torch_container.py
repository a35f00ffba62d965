"""The files that `torch.save` writes: zip archives, the older format, and plain pickles."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
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


def read_container(
    stream: IO[bytes], buffer: Buffer, read: Callable[[int, int], None] | None = None
) -> Any:
    """Read what was saved: dicts, lists, texts, numbers, tensors, and stand-ins for the rest.

    Args:
        stream: the file, at its start.
        buffer: the same bytes, which tensors are views of.
        read: reads a part of an archive into the buffer, where that is still to be done. Numbers of
            tensors are not read then, but for those that are copied or single.

    Raises:
        OtherFormatError: it is an archive of another kind.
        UnsafePickleError: it would take memory or time out of proportion.
        MoreThanWeightsError: it was made to run code, or is a plain pickle without tensors.
        Exception: it is damaged.
    """
    if read is not None or bytes(buffer[: len(ZIP)]) == ZIP:
        return _read_zip(stream, buffer, read)
    return _read_legacy(stream, buffer)


def _read_zip(stream: IO[bytes], buffer: Buffer, read: Callable[[int, int], None] | None) -> Any:
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        root = _archive_root([entry.filename for entry in entries])
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
        order = archive.read(wanted["byteorder"]) if "byteorder" in wanted else b"little"
        if order not in (b"little", b"big"):
            raise ValueError("no byte order")
        storages: dict[str, Storage] = {}

        def persistent(identity: Any) -> Any:
            (kind, key, _location, count) = _storage_of(identity)
            key = _plain(key)
            if key not in storages:
                entry, storage = wanted[f"data/{key}"], Storage(storage_type(kind), count)
                if storage.length > entry.file_size:
                    raise ValueError(f"a storage of {storage.length} bytes in {entry.file_size}")
                if read is not None:
                    read(entry.header_offset, _LOCAL_HEADER)
                start = _start(entry, buffer)
                storage.attach(buffer, start, swapped=order == b"big", read=read)
                storages[key] = storage
            return storages[key]

        reader = PickleReader(_CALLS, persistent, Allowance(len(buffer)))
        return reader.read(io.BytesIO(archive.read(wanted["data.pkl"])))


def _archive_root(names: list[str]) -> str:
    """The folder of the archive that its pickle lies in; empty where there is none.

    Raises:
        OtherFormatError: readers could differ in what they take.
    """
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    root = pickles[0].removesuffix("data.pkl") if pickles else ""
    # torch looks up the first of two, in the folder of the first entry, in any case of letters
    wanted = (f"{root}data".lower(), f"{root}byteorder".lower())
    read = [name for name in map(str.lower, names) if name.startswith(wanted)]
    if root and len(set(read)) < len(read):
        raise OtherFormatError("two entries of one name, which torch.save never writes")
    if len(pickles) > 1 or not names[:1][0].startswith(root):
        raise OtherFormatError("entries in two folders, which torch.save never writes")
    return root


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
    if type(content) is not int or content != _MAGIC:  # to compare a tensor may take any memory
        if not reader.allowance.tensors:
            raise MoreThanWeightsError(reader.foreign or "a plain pickle")
        return content
    _version, system = reader.read(stream), reader.read(stream)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("numbers of the other byte order")
    content, keys = reader.read(stream), reader.read(stream)
    at = stream.tell()
    if not isinstance(keys, list) or len(set(map(_plain, keys))) < len(keys):
        raise ValueError("no list of its storages")
    for key in keys:
        storage = storages[key]
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

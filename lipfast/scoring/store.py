"""Write a store of scores: a folder of immutable Parquet files, append-only and crash-safe."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lipfast.checkpoints.home import expanded
from lipfast.errors import StoreError
from lipfast.scoring.schema import FORMAT, SCHEMA, VERSION, Row

SCHEMA_FILE = "schema.json"
PART_PATTERN = "part-*.parquet"

_STALE_SECONDS = 86_400.0  # a temporary file this old belongs to no living writer
_FIRST_INTERVAL, _LAST_INTERVAL, _SHARE = 2.0, 60.0, 0.02


class StoreWriter:
    """Appends rows to a store, a part at a time.

    A part is written under a temporary name, synced, and renamed: it is there completely or not at
    all, whenever the process is killed. Several writers may append to one store. As a context
    manager it commits what it holds on the way out, after an error too.

    Args:
        path: the store's folder; made, with its parents, where it is missing.
        rows_per_part: a part is committed once this many rows wait.

    Raises:
        StoreError: the folder cannot be made or written, a file is in its place, or the store has
            an unknown schema version.
    """

    def __init__(self, path: str | os.PathLike[str], *, rows_per_part: int = 5000) -> None:
        self.path = store_folder(path)
        self.rows_per_part = rows_per_part
        self.rows_written = 0
        self.seconds = 0.0
        self._rows: list[Row] = []
        self._opened = self._flushed = time.monotonic()
        _prepare(self.path)

    def append(self, rows: Sequence[Row]) -> None:
        """Take rows (column name to value) and commit a part when one is due.

        A part is due after some seconds, more as the run grows longer, so that neither a crash
        costs much work nor a long run leaves thousands of files.
        """
        self._rows.extend(rows)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Commit the rows that wait if they have waited long enough, or are many."""
        now = time.monotonic()
        interval = max(_FIRST_INTERVAL, min(_LAST_INTERVAL, _SHARE * (now - self._opened)))
        if len(self._rows) >= self.rows_per_part or now - self._flushed >= interval:
            self.flush()

    def flush(self) -> None:
        """Commit the rows that wait, as one part.

        Raises:
            StoreError: the part cannot be written; the rows stay, for another try.
        """
        started = time.perf_counter()
        if self._rows:
            write_part(self.path, pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self.rows_written += len(self._rows)
            self._rows = []
        self._flushed = time.monotonic()
        self.seconds += time.perf_counter() - started

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.flush()


def store_folder(path: str | os.PathLike[str]) -> Path:
    """Return the local folder that `path`, perhaps a `file://` URL, names.

    Raises:
        StoreError: the URL names something that is not a local folder.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise StoreError(f"a store must be the path of a folder, not {path!r}")
    text = os.fspath(path).removeprefix("file://")
    if "://" in text:
        raise StoreError(f"a store must be a local folder, not '{text}'")
    return expanded(text)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(
            f"cannot make the store '{folder}': a file is in its place. Choose another folder"
        ) from error
    except OSError as error:
        raise StoreError(
            f"cannot make the store '{folder}': {error.strerror}. Choose a writable folder"
        ) from error
    if (folder / SCHEMA_FILE).exists():
        if check_version(folder) < VERSION:
            _write_schema(folder)  # parts of the earlier version stay: readers know them
        write_file(folder, None, b"")  # find out now, not after hours, that nothing can be written
    elif parts(folder):
        raise StoreError(
            f"the store '{folder}' has lost its {SCHEMA_FILE}: put it back, or choose another "
            "folder"
        )
    else:
        _write_schema(folder)
    _remove_stale(folder)


def _write_schema(folder: Path) -> None:
    columns = {field.name: str(field.type) for field in SCHEMA}
    content = {"format": FORMAT, "version": VERSION, "columns": columns}
    write_file(folder, SCHEMA_FILE, json.dumps(content, indent=1).encode() + b"\n")


def check_version(folder: Path) -> int:
    """Return the schema's version of a store.

    Raises:
        StoreError: there is no store, or its version is none that this lipfast reads.
    """
    if not folder.exists():
        raise StoreError(f"no store at '{folder}': there is no such folder")
    if not folder.is_dir():
        raise StoreError(f"'{folder}' is a file; a store is a folder")
    try:
        content = json.loads((folder / SCHEMA_FILE).read_bytes())
    except FileNotFoundError as error:
        raise StoreError(f"'{folder}' is not a store: it has no {SCHEMA_FILE}") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read '{folder / SCHEMA_FILE}': {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"'{folder}' is not a store of scores: see its {SCHEMA_FILE}")
    version = content.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise StoreError(
            f"the store '{folder}' has schema version {version!r}; this lipfast "
            f"knows versions 1 to {VERSION}. Use the lipfast that wrote it, or choose another "
            "folder"
        )
    return version


def parts(folder: Path) -> list[Path]:
    """List the parts of a store, the oldest first."""
    return sorted(folder.glob(PART_PATTERN))


def write_part(folder: Path, table: pa.Table) -> None:
    """Commit a table as one part.

    Raises:
        StoreError: it cannot be written; nothing of it is there then.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
    write_file(folder, name, sink.getvalue().to_pybytes())


def write_file(folder: Path, name: str | None, content: bytes) -> None:
    """Write a file so that it is there completely or not at all; only a trial if `name` is None."""
    temporary = folder / f".writing-{uuid.uuid4().hex}"
    try:
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            if name is not None:
                temporary.replace(folder / name)
                _sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot write to the store '{folder}': {error.strerror or error}. Check its "
            "permissions and the free space"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure; not every system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".writing-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()

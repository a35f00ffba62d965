"""The store of scores: a folder of immutable Parquet files, append-only and crash-safe."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from lipfast.checkpoints.metadata import INT64_MAX, parse_value
from lipfast.errors import ArgumentError, StoreError

FORMAT = "lipfast scores"
VERSION = 1
SCHEMA_FILE = "schema.json"
PART_PATTERN = "part-*.parquet"

Row: TypeAlias = "dict[str, Any]"

LAYER = pa.struct(
    [
        pa.field("index", pa.int32()),
        pa.field("name", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("shape", pa.list_(pa.int64())),
        pa.field("lower", pa.float64()),
        pa.field("upper", pa.float64()),
        pa.field("certified", pa.bool_()),
        pa.field("passes", pa.int32()),
    ]
)
"""One layer of a checkpoint: a bracket of its operator norm."""

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime", pa.float64(), nullable=False),
        pa.field("run", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("epoch", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("upper", pa.float64()),
        pa.field("log_upper", pa.float64()),
        pa.field("upper_certified", pa.bool_()),
        pa.field("lower", pa.float64()),
        pa.field("lower_certified", pa.bool_()),
        pa.field("lower_sample", pa.int64()),
        pa.field("jacobian_max", pa.float64()),
        pa.field("mean", pa.float64()),
        pa.field("rms", pa.float64()),
        pa.field("samples", pa.int64()),
        pa.field("norm", pa.float64(), nullable=False),
        pa.field("seconds_read", pa.float64()),
        pa.field("seconds_upper", pa.float64()),
        pa.field("seconds_lower", pa.float64()),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("arch", pa.string()),
        pa.field("data", pa.string()),
        pa.field("lipfast_version", pa.string(), nullable=False),
        pa.field("torch_version", pa.string(), nullable=False),
        pa.field("capability", pa.string(), nullable=False),
        pa.field("metadata", pa.string()),
        pa.field("layers", pa.list_(LAYER)),
    ],
)
"""One row per checkpoint. `norm` is 1, 2 or inf; times are seconds; `metadata` is a JSON object."""

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
            _write_part(self.path, pa.Table.from_pylist(self._rows, schema=SCHEMA))
            self.rows_written += len(self._rows)
            self._rows = []
        self._flushed = time.monotonic()
        self.seconds += time.perf_counter() - started

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
    return Path(text).expanduser()


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
        _check_version(folder)
        _write_file(folder, None, b"")  # find out now, not after hours, that nothing can be written
    elif _parts(folder):
        raise StoreError(
            f"the store '{folder}' has lost its {SCHEMA_FILE}: put it back, or choose another "
            "folder"
        )
    else:
        columns = {field.name: str(field.type) for field in SCHEMA}
        content = {"format": FORMAT, "version": VERSION, "columns": columns}
        _write_file(folder, SCHEMA_FILE, json.dumps(content, indent=1).encode() + b"\n")
    _remove_stale(folder)


def _check_version(folder: Path) -> None:
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
    if content.get("version") != VERSION:
        raise StoreError(
            f"the store '{folder}' has schema version {content.get('version')!r}; this lipfast "
            f"knows version {VERSION}. Use the lipfast that wrote it, or choose another folder"
        )


def _write_part(folder: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
    _write_file(folder, name, sink.getvalue().to_pybytes())


def _write_file(folder: Path, name: str | None, content: bytes) -> None:
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


# Reading


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(PART_PATTERN))


def _read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise StoreError(f"the part '{part}' has other columns than schema {VERSION}")
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"the part '{part}' is corrupt: {error}. Move it out of the store; its checkpoints are "
            "scored again by the next run"
        ) from error


def _read_all(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    folder = store_folder(path)
    _check_version(folder)
    tables = [_read_part(part, columns) for part in _parts(folder)]
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    return pa.concat_tables(tables) if tables else schema.empty_table()


FileKey: TypeAlias = "tuple[str, int, float]"


def completed(path: str | os.PathLike[str]) -> dict[FileKey, list[tuple[str, str]]]:
    """Find what a store holds already.

    Checkpoints whose row is an error are left out: they are tried again by every run.

    Args:
        path: the store's folder.

    Returns:
        (uri, size, mtime) of a scored file to the pairs (fingerprint, metadata as JSON) of its
        rows; empty when there is no store yet.

    Raises:
        StoreError: the store cannot be read; a corrupt part is named.
    """
    folder = store_folder(path)
    empty = folder.is_dir() and not (folder / SCHEMA_FILE).exists() and not _parts(folder)
    if empty or not folder.exists():
        return {}
    names = ("uri", "size", "mtime", "status", "fingerprint", "metadata")
    table = _read_all(path, names)
    found: dict[FileKey, list[tuple[str, str]]] = {}
    for uri, size, mtime, status, fingerprint, metadata in zip(
        *(table.column(name).to_pylist() for name in names), strict=True
    ):
        if status == "ok":
            found.setdefault((uri, size, mtime), []).append((fingerprint, metadata or "{}"))
    return found


def read_scores(
    path: str | os.PathLike[str], table: Literal["checkpoints", "layers"] = "checkpoints"
) -> pa.Table:
    """Read a store of scores.

    One row per checkpoint (`uri`) and `fingerprint`, the newest; a failed attempt disappears once a
    later one on the same checkpoint succeeded. Rows are sorted by run, step and URI.

    Args:
        path: the store's folder.
        table: `"checkpoints"`: bounds, statistics, status and provenance, and the metadata as
            columns `meta.<key>` (numbers where every value is one, else text); `"layers"`: one row
            per layer, with the checkpoint's uri, run, step, epoch and fingerprint.

    Returns:
        A `pyarrow.Table`; `.to_pandas()` makes a data frame, polars and DuckDB take it as it is.

    Raises:
        ArgumentError: `table` is neither.
        StoreError: no store there, an unknown schema version, or a corrupt part, which is named.

    Example:
        >>> import tempfile
        >>> from lipfast.scoring.store import StoreWriter
        >>> folder = tempfile.mkdtemp()
        >>> with StoreWriter(folder):
        ...     pass
        >>> read_scores(folder).num_rows
        0
    """
    if table not in ("checkpoints", "layers"):
        raise ArgumentError(f"table must be 'checkpoints' or 'layers', got {table!r}")
    rows = _newest(_read_all(path))
    if table == "layers":
        return _layers(rows)
    scores = rows.drop_columns(["metadata", "layers"])
    for name, column in _expand(rows.column("metadata").to_pylist()).items():
        scores = scores.append_column(f"meta.{name}", column)
    return scores


def _newest(table: pa.Table) -> pa.Table:
    names = ("uri", "fingerprint", "status", "run", "step")
    values = [table.column(name).to_pylist() for name in names]
    values.append(table.column("scored_at").cast(pa.int64()).to_pylist())
    newest: dict[tuple[str, str], tuple[int, int]] = {}
    succeeded: dict[str, int] = {}
    for index, (uri, fingerprint, status, _, _, scored_at) in enumerate(zip(*values, strict=True)):
        newest[uri, fingerprint] = max(newest.get((uri, fingerprint), (-1, -1)), (scored_at, index))
        if status == "ok":
            succeeded[uri] = max(succeeded.get(uri, -1), scored_at)
    statuses, runs, steps = values[2:5]
    kept = [
        (runs[index] or "", math.inf if steps[index] is None else steps[index], uri, index)
        for (uri, _), (scored_at, index) in newest.items()
        if statuses[index] == "ok" or succeeded.get(uri, -1) < scored_at
    ]
    return table.take(pa.array([row[-1] for row in sorted(kept)], pa.int64()))


def _layers(rows: pa.Table) -> pa.Table:
    layers = rows.column("layers").combine_chunks()
    parents = layers.value_parent_indices()
    flat = layers.flatten()
    columns = {
        name: rows.column(name).take(parents)
        for name in ("uri", "run", "step", "epoch", "fingerprint")
    }
    for field in LAYER:
        columns[field.name] = pa.chunked_array([flat.field(field.name)], type=field.type)
    return pa.table(columns)


def _expand(texts: Sequence[str | None]) -> dict[str, pa.Array]:
    """Turn one JSON object per row into one column per key, in order of first appearance."""
    found: dict[str, list[Any]] = {}
    for index, text in enumerate(texts):
        for key, value in json.loads(text or "{}").items():
            found.setdefault(key, [None] * len(texts))[index] = value
    return {key: _column(values) for key, values in found.items()}


def _column(values: list[Any]) -> pa.Array:
    numbers = [_non_finite(value) for value in values]
    kinds = {type(value) for value in numbers if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(v is None or abs(v) <= INT64_MAX for v in numbers):
        return pa.array(numbers, pa.int64())
    if kinds <= {int, float}:
        return pa.array([None if v is None else _to_float(v) for v in numbers], pa.float64())
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(texts, pa.string())


def _non_finite(value: Any) -> Any:
    parsed = parse_value(value) if isinstance(value, str) else value
    return parsed if isinstance(parsed, float) else value


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True)
class Verification:
    """What `verify_store` found.

    Attributes:
        parts: number of parts.
        rows: rows in the parts that can be read.
        problems: one sentence per problem; empty when the store is sound.
    """

    parts: int
    rows: int
    problems: tuple[str, ...]


def verify_store(path: str | os.PathLike[str]) -> Verification:
    """Read every part of a store, completely, and check it.

    Checked are that each part can be read, has the columns of the schema, and that its rows keep
    the schema's promises: a known status, a reason for each error, `lower <= upper` where both
    are certified.

    Raises:
        StoreError: there is no store of a known version at `path`.
    """
    folder = store_folder(path)
    _check_version(folder)
    rows, problems = 0, []
    parts = _parts(folder)
    for part in parts:
        try:
            table = _read_part(part)
        except StoreError as error:
            problems.append(str(error))
            continue
        rows += table.num_rows
        problems.extend(f"the part '{part}': {problem}" for problem in _row_problems(table))
    return Verification(len(parts), rows, tuple(problems))


def _row_problems(table: pa.Table) -> Iterator[str]:
    names = ("uri", "status", "error", "lower", "upper", "lower_certified", "upper_certified")
    columns: Mapping[str, list[Any]] = {name: table.column(name).to_pylist() for name in names}
    for uri, status, error, lower, upper, low_ok, up_ok in zip(*columns.values(), strict=True):
        if status not in ("ok", "error"):
            yield f"{uri}: unknown status {status!r}"
        elif status == "error" and not error:
            yield f"{uri}: an error without a reason"
        elif status == "ok" and (lower is None or upper is None):
            yield f"{uri}: a bound is missing"
        elif status == "ok" and low_ok and up_ok and not lower <= upper:
            yield f"{uri}: its lower bound {lower} exceeds its upper bound {upper}"

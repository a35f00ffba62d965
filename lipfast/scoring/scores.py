"""Read a store of scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lipfast.checkpoints.metadata import INT64_MAX, parse_value
from lipfast.errors import ArgumentError, StoreError
from lipfast.scoring.schema import (
    LAYER,
    READING,
    SCHEMA,
    UNREADABLE,
    VERSION,
    is_outdated,
    upgraded,
)
from lipfast.scoring.store import check_version, parts, store_folder

_TRIES = 10  # each fails only if the store was compacted meanwhile


def read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part, of any known version, with the newest version's columns or some of them.

    Raises:
        FileNotFoundError: it is gone: the store was compacted.
        StoreError: it is corrupt, or has other columns than any known version.
    """
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            if upgraded(file.schema_arrow.empty_table()) is None:
                raise StoreError(
                    f"the part '{part}' has other columns than schema 1 to {VERSION}: use the "
                    "lipfast that wrote it, or move it out of the store"
                )
            if columns is None:
                return upgraded(file.read())
            there = set(file.schema_arrow.names)
            table = file.read(columns=[name for name in columns if name in there])
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"the part '{part}' is corrupt: {error}. Move it out of the store; its checkpoints are "
            "scored again by the next run"
        ) from error
    for name in columns:
        if name not in there:
            table = table.append_column(name, pa.nulls(table.num_rows, SCHEMA.field(name).type))
    return table.select(list(columns))


def read_rows(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a store, superseded ones included.

    Raises:
        StoreError: no store there, an unknown schema version, or a corrupt part, which is named.
    """
    folder = store_folder(path)
    check_version(folder)
    for attempt in range(_TRIES):
        try:
            tables = [read_part(part, columns) for part in parts(folder)]
            break
        except FileNotFoundError as error:
            if attempt == _TRIES - 1:
                raise StoreError(f"parts of the store '{folder}' vanish: {error}") from error
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    return pa.concat_tables(tables) if tables else schema.empty_table()


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
    rows = newest(read_rows(path).combine_chunks())
    if table == "layers":
        return _layers(rows)
    scores = rows.drop_columns(["metadata", "layers"])
    for name, column in _metadata_columns(rows.column("metadata").to_pylist()).items():
        scores = scores.append_column(f"meta.{name}", column)
    return scores


def newest(table: pa.Table) -> pa.Table:
    """Keep one row per checkpoint and fingerprint, and failures that nothing succeeded after.

    Scores of a file that may have been read in another way then are dropped where it cannot be read
    now, whatever they were made with.
    """
    void = _void(table)
    names = ("uri", "fingerprint", "status", "run", "step")
    values = [table.column(name).to_pylist() for name in names]
    values.append(table.column("scored_at").cast(pa.int64()).to_pylist())
    newest: dict[tuple[str, str], tuple[int, int]] = {}
    succeeded: dict[str, int] = {}
    for index, (uri, fingerprint, status, _, _, scored_at) in enumerate(zip(*values, strict=True)):
        newest[uri, fingerprint] = max(newest.get((uri, fingerprint), (-1, -1)), (scored_at, index))
        if status == "ok" and index not in void:
            succeeded[uri] = max(succeeded.get(uri, -1), scored_at)
    statuses, runs, steps = values[2:5]
    kept = [
        (runs[index] or "", math.inf if steps[index] is None else steps[index], uri, index)
        for (uri, _), (scored_at, index) in newest.items()
        if index not in void and (statuses[index] == "ok" or succeeded.get(uri, -1) < scored_at)
    ]
    return table.take(pa.array([row[-1] for row in sorted(kept)], pa.int64()))


def _void(table: pa.Table) -> set[int]:
    """Rows that are outdated and whose file, as it is, was found to be unreadable since."""
    refused: dict[tuple[Any, ...], int] = {}
    outdated = []
    names = ("uri", "size", "mtime", "status", "kind", "note", "reading")
    columns = [table.column(name).to_pylist() for name in names]
    times = table.column("scored_at").cast(pa.int64()).to_pylist()
    for index, (*key, status, kind, note, reading) in enumerate(zip(*columns, strict=True)):
        if status == "ok" and is_outdated(key[0], note, reading):
            outdated.append((index, tuple(key)))
        elif kind == UNREADABLE and reading == READING:
            refused[tuple(key)] = max(refused.get(tuple(key), -1), times[index])
    return {index for index, key in outdated if times[index] < refused.get(key, -1)}


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


def _metadata_columns(texts: Sequence[str | None]) -> dict[str, pa.Array]:
    """Turn one JSON object per row into one column per key, in order of first appearance."""
    found: dict[str, list[Any]] = {}
    for index, text in enumerate(texts):
        for key, value in json.loads(text or "{}").items():
            if key not in found:
                found[key] = [None] * len(texts)
            found[key][index] = value
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

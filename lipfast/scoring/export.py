"""Export a store as one CSV, JSON lines or Parquet file."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lipfast.checkpoints.home import expanded
from lipfast.errors import ArgumentError, StoreError
from lipfast.scoring.scores import read_scores
from lipfast.text import strict_json

Table = Literal["checkpoints", "layers"]

_ROWS_AT_ONCE = 10_000


def export_scores(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    table: Table = "checkpoints",
    *,
    overwrite: bool = False,
) -> int:
    """Write what `read_scores` returns into one file.

    Args:
        path: the store's folder.
        to: a file that ends in `.csv`, `.jsonl` or `.parquet`.
        table: `"checkpoints"` or `"layers"`.
        overwrite: replace a file that is there.

    Returns:
        The number of rows.

    Raises:
        ArgumentError: another ending, an unknown table, or the file is there already.
        StoreError: the store cannot be read, or the file cannot be written.
    """
    target = expanded(to)
    write = _WRITERS.get(target.suffix.lower())
    if write is None:
        raise ArgumentError(f"cannot export to '{to}': expected an ending {', '.join(_WRITERS)}")
    if target.exists() and not overwrite:
        raise ArgumentError(f"'{to}' is there already: choose another name, or --overwrite")
    rows = read_scores(path, table)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        try:
            write(rows, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write '{to}': {error.strerror or error}") from error
    return int(rows.num_rows)


def _write_csv(rows: pa.Table, path: Path) -> None:
    for index, field in enumerate(rows.schema):
        if pa.types.is_list(field.type):
            texts = [json.dumps(value) for value in rows.column(index).to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(texts, pa.string()))
    pyarrow.csv.write_csv(rows, path)


def _write_json_lines(rows: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for batch in rows.to_batches(max_chunksize=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                stream.write(json.dumps(strict_json(row), default=str) + "\n")


def _write_parquet(rows: pa.Table, path: Path) -> None:
    pq.write_table(rows, path, compression="zstd")


_WRITERS: Mapping[str, Callable[[pa.Table, Path], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}

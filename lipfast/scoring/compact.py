"""Merge the parts of a store into few, and drop rows that newer ones replace."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lipfast.errors import StoreError
from lipfast.scoring.scores import newest, read_part
from lipfast.scoring.store import check_version, parts, store_folder, write_part

ROWS_PER_PART = 100_000


@dataclass(frozen=True)
class Compaction:
    """What `compact_store` did.

    Attributes:
        parts_before: number of parts there were.
        parts_after: number of parts that hold their rows now.
        rows_before: rows there were.
        rows_after: rows that are left: one per checkpoint and fingerprint, the newest.
    """

    parts_before: int
    parts_after: int
    rows_before: int
    rows_after: int


def compact_store(path: str | os.PathLike[str]) -> Compaction:
    """Merge the parts of a store into few; `read_scores` shows the same rows before and after.

    The merged parts are committed before the old ones are deleted. Killed in between, the rows are
    there twice, which readers do not show and the next compaction removes. Scorers may write to the
    store meanwhile: only parts that were read are deleted.

    Raises:
        StoreError: there is no store, a part is corrupt, or the store cannot be written; the store
            is as it was then.

    Example:
        >>> import tempfile
        >>> from lipfast.scoring.store import StoreWriter
        >>> folder = tempfile.mkdtemp()
        >>> with StoreWriter(folder):
        ...     pass
        >>> compact_store(folder)
        Compaction(parts_before=0, parts_after=0, rows_before=0, rows_after=0)
    """
    folder = store_folder(path)
    check_version(folder)
    old = parts(folder)
    if not old:
        return Compaction(0, 0, 0, 0)
    try:
        table = pa.concat_tables([read_part(part) for part in old])
    except FileNotFoundError as error:
        raise StoreError(
            f"the store '{folder}' is being compacted by somebody else: {error}"
        ) from error
    kept = newest(table)
    if len(old) == 1 and kept.num_rows == table.num_rows:
        return Compaction(1, 1, table.num_rows, kept.num_rows)
    starts = range(0, kept.num_rows, ROWS_PER_PART)
    for start in starts:
        write_part(folder, kept.slice(start, ROWS_PER_PART))
    for part in old:
        _delete(part)
    return Compaction(len(old), len(starts), table.num_rows, kept.num_rows)


def _delete(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot delete the merged part '{part}': {error.strerror}. Its rows are there twice, "
            "which readers do not show; compact again"
        ) from error

"""Logs of training in Parquet: one row per run and logged step."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.config import SweepConfig
from experiments.files import write_whole
from experiments.train import LogRow, Network
from lipfast.errors import StoreError

_NUMBERS = (
    "epoch",
    "lr",
    "train_loss",
    "test_loss",
    "train_error",
    "test_error",
    "gradient_norm",
    "path_length",
    "distance",
    "weight_norm",
)
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("width", pa.int64()),
        ("seed", pa.int64()),
        ("step", pa.int64()),
        *((name, pa.float64()) for name in _NUMBERS),
    ]
)


def metrics_table(
    rows: Sequence[LogRow], config: SweepConfig, run_name: Callable[[Network], str]
) -> pa.Table:
    """Make a table of log rows.

    Args:
        rows: from `train_group`.
        config: of the sweep.
        run_name: name of a network's run.

    Returns:
        With the columns of `SCHEMA`; a run that diverged has NaN or infinity in its last row.
    """
    records = [
        {
            "run": run_name(row.network),
            "width": row.network.width,
            "seed": row.network.seed,
            "step": row.step,
            "epoch": row.step / config.steps_per_epoch,
            "lr": row.lr,
            "train_loss": row.metrics.train_loss,
            "test_loss": row.metrics.test_loss,
            "train_error": row.metrics.train_error,
            "test_error": row.metrics.test_error,
            "gradient_norm": row.gradient_norm,
            "path_length": row.path_length,
            "distance": row.distance,
            "weight_norm": row.weight_norm,
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, SCHEMA)


def write_part(path: Path, table: pa.Table) -> None:
    """Write the log of one group; it is there whole or not at all."""
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_whole(path, content.getvalue())


def read_parts(folder: Path) -> pa.Table:
    """Read the logs of all groups of a sweep, ordered by width, seed and step.

    Raises:
        StoreError: there are none, or a file is damaged.
    """
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise StoreError(f"{folder}: no logs there; run the study first")
    try:
        table = pa.concat_tables([pq.read_table(path, schema=SCHEMA) for path in paths])
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{folder}: a log is damaged: {error}; delete it and run again") from None
    return table.sort_by([(name, "ascending") for name in ("width", "seed", "step")])

"""The scores of a sweep against width: averages over seeds, and where they peak."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lipfast.errors import StoreError

# Quantity to column of `lipfast.read_scores`. "lower" is the study's lower bound, the largest
# Jacobian norm over the training samples.
COLUMNS = {
    "train_loss": "meta.train_loss",
    "test_loss": "meta.test_loss",
    "train_error": "meta.train_error",
    "test_error": "meta.test_error",
    "lower": "jacobian_max",
    "mean": "mean",
    "upper": "upper",
}
Curves = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class WidthSummary:
    """Quantities against width at the last step, over seeds.

    Attributes:
        widths: ascending, int64 (W,).
        seeds: number of runs behind each width, int64 (W,).
        mean: quantity (a key of `COLUMNS`) to float64 (W,).
        std: the same; sample standard deviation, 0 where there is one run.
    """

    widths: NDArray[np.int64]
    seeds: NDArray[np.int64]
    mean: Curves
    std: Curves


def scored_rows(table: pa.Table) -> dict[str, NDArray[np.float64]]:
    """Extract the scored checkpoints as columns of numbers.

    Args:
        table: from `lipfast.read_scores`.

    Returns:
        "width", "seed", "step" and the keys of `COLUMNS`, each float64 (checkpoints,). Rows whose
        status is not "ok" are left out.

    Raises:
        StoreError: a column is missing or no checkpoint was scored.
    """
    columns = {"width": "meta.width", "seed": "meta.seed", "step": "step", **COLUMNS}
    missing = [c for c in ("status", *columns.values()) if c not in table.column_names]
    if missing:
        raise StoreError(f"the scores have no column {', '.join(missing)}; score them anew")
    scored = table.filter(pc.equal(table["status"], "ok"))
    if scored.num_rows == 0:
        raise StoreError("no checkpoint of the sweep has a score; see the status in the store")
    return {
        name: np.array(
            [math.nan if value is None else float(value) for value in scored[column].to_pylist()]
        )
        for name, column in columns.items()
    }


def summarise(table: pa.Table) -> WidthSummary:
    """Average over seeds, per width, at the last step of the sweep.

    Runs without a score at that step (they diverged, or could not be scored) do not count.

    Args:
        table: from `lipfast.read_scores`.

    Raises:
        StoreError: a column is missing or no checkpoint was scored.
    """
    rows = scored_rows(table)
    last = rows["step"] == rows["step"].max()
    widths = np.unique(rows["width"][last])
    chosen = [last & (rows["width"] == width) for width in widths]
    return WidthSummary(
        widths=widths.astype(np.int64),
        seeds=np.array([int(rows_of.sum()) for rows_of in chosen]),
        mean={name: np.array([rows[name][c].mean() for c in chosen]) for name in COLUMNS},
        std={
            name: np.array([rows[name][c].std(ddof=1) if c.sum() > 1 else 0.0 for c in chosen])
            for name in COLUMNS
        },
    )


def peak_widths(
    summary: WidthSummary, names: Iterable[str] = ("test_loss", "lower", "upper")
) -> dict[str, int]:
    """Return, for each quantity, the width at which its mean over seeds is largest.

    Example:
        >>> curve = np.array([1.0, 3.0, 2.0])
        >>> summary = WidthSummary(np.array([4, 8, 16]), np.ones(3), {"upper": curve}, {})
        >>> peak_widths(summary, ["upper"])
        {'upper': 8}
    """
    return {name: int(summary.widths[np.nanargmax(summary.mean[name])]) for name in names}


def neighbouring(widths: Iterable[int], first: int, second: int) -> bool:
    """Say whether two widths are the same or next to each other among the widths of a sweep.

    Example:
        >>> neighbouring([4, 8, 16], 8, 16), neighbouring([4, 8, 16], 4, 16)
        (True, False)
    """
    order = sorted(int(width) for width in widths)
    return abs(order.index(first) - order.index(second)) <= 1

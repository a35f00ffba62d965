"""Results of a study: one small Parquet file, from which its figure and verdict are rebuilt.

`experiments/results/<study>.parquet` holds scores and metrics reduced to what the report needs; its
metadata say the scale and the settings of every sweep that entered.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from experiments.files import write_whole
from lipfast.errors import StoreError

RESULTS_FOLDER = Path(__file__).parent / "results"
_KEY = b"experiments"


@dataclass(frozen=True)
class Averages:
    """A quantity against another, over seeds.

    Attributes:
        x: ascending (n,).
        mean: (n,).
        std: sample standard deviation (n,), 0 where there is one run.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


class Rows:
    """A table as arrays: numbers as float64 with NaN where there is none, text as objects."""

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self._columns = dict(columns)

    @staticmethod
    def of(table: pa.Table) -> Rows:
        """Convert an Arrow table."""
        columns: dict[str, NDArray[Any]] = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_string(column.type):
                columns[name] = np.array(column.to_pylist(), dtype=object)
            else:
                columns[name] = np.array(
                    [np.nan if value is None else float(value) for value in column.to_pylist()]
                )
        return Rows(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def where(self, **equal: object) -> Rows:
        """Keep the rows whose columns equal the given values."""
        chosen = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            chosen &= self._columns[name] == value
        return self.keep(chosen)

    def keep(self, chosen: NDArray[np.bool_]) -> Rows:
        """Keep the rows that a mask (rows,) says."""
        return Rows({name: column[chosen] for name, column in self._columns.items()})

    def last(self) -> Rows:
        """Keep, of every run (study, variant, width, seed), the row with the largest step."""
        names = [n for n in ("study", "variant", "width", "seed") if n in self]
        runs = list(zip(*(self[name].tolist() for name in names), strict=True))
        newest: dict[tuple[Any, ...], float] = {}
        for run, step in zip(runs, self["step"], strict=True):
            newest[run] = max(step, newest.get(run, step))
        ends = [newest[run] == step for run, step in zip(runs, self["step"], strict=True)]
        return self.keep(np.array(ends, dtype=bool))

    def values(self, name: str) -> list[Any]:
        """The different values of a column, ascending, without NaN."""
        column = self._columns[name]
        return sorted({value for value in column.tolist() if not _is_nan(value)})

    def average(self, by: str, name: str) -> Averages:
        """Mean and standard deviation of a column per value of another; NaN is left out."""
        x, mean, std = [], [], []
        for value in self.values(by):
            chosen = self._columns[name][self._columns[by] == value]
            chosen = chosen[~np.isnan(chosen)]
            if len(chosen):
                x.append(value)
                mean.append(chosen.mean())
                std.append(chosen.std(ddof=1) if len(chosen) > 1 else 0.0)
        return Averages(np.array(x, dtype=np.float64), np.array(mean), np.array(std))

    def by_seed(self, by: str, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """A column as a matrix (seeds, values of `by`), NaN where a run is missing.

        Returns:
            The values of `by` for which there is a run, ascending, and the matrix.
        """
        grid, seeds = self.values(by), self.values("seed")
        matrix = np.full((len(seeds), len(grid)), np.nan)
        for x, seed, value in zip(self[by], self["seed"], self[name], strict=True):
            matrix[seeds.index(seed), grid.index(x)] = value
        present = ~np.isnan(matrix).all(axis=0)
        return np.array(grid)[present].astype(np.int64), matrix[:, present]


@dataclass(frozen=True)
class Results:
    """What is stored of a study.

    Attributes:
        rows: the table.
        scale: that the study was run at.
        settings: sweep (`<study>/<variant>`, or the study alone) to its settings.
    """

    rows: Rows
    scale: str
    settings: Mapping[str, Mapping[str, Any]]


def results_path(study: str, folder: Path = RESULTS_FOLDER) -> Path:
    """Return where the results of a study lie."""
    return folder / f"{study}.parquet"


def write_results(
    study: str,
    rows: Iterable[Mapping[str, object]],
    *,
    scale: str,
    settings: Mapping[str, Mapping[str, Any]],
    folder: Path = RESULTS_FOLDER,
) -> Path:
    """Write the results of a study; the file is there whole or not at all.

    Args:
        study: its name.
        rows: with text or numbers; a column that a row lacks is null there.
        scale: that the study was run at.
        settings: of the sweeps that entered.
        folder: of all results.

    Returns:
        The path.

    Raises:
        StoreError: there are no rows, or the file cannot be written.
    """
    listed = list(rows)
    if not listed:
        raise StoreError(f"{study}: no run has a score, so there are no results to keep")
    names = list(dict.fromkeys(name for row in listed for name in row))
    table = pa.table({name: [row.get(name) for row in listed] for name in names})
    about = json.dumps({"study": study, "scale": scale, "settings": settings}, sort_keys=True)
    table = table.replace_schema_metadata({_KEY: about.encode()})
    path = results_path(study, folder)
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise StoreError(f"{path}: cannot write results: {error}") from None
    return path


def read_results(study: str, folder: Path = RESULTS_FOLDER) -> Results | None:
    """Read the results of a study, None if it has not been run.

    Raises:
        StoreError: the file is damaged or was not written by `write_results`.
    """
    path = results_path(study, folder)
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_KEY])
        return Results(Rows.of(table), about["scale"], about["settings"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: not a file of results ({error}); collect the study again"
        ) from None

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.results import Rows, read_results, results_path, write_results
from lipfast.errors import StoreError

ROWS = [
    {"study": "s", "variant": "a", "width": 4, "seed": 0, "step": 0, "lower": 1.0},
    {"study": "s", "variant": "a", "width": 4, "seed": 0, "step": 9, "lower": 2.0},
    {"study": "s", "variant": "a", "width": 4, "seed": 1, "step": 7, "lower": 4.0},
    {"study": "s", "variant": "a", "width": 8, "seed": 0, "step": 9, "lower": None},
    {"study": "s", "variant": "b", "width": 8, "seed": 1, "step": 9, "upper": 5.0},
]


def _stored(folder: Path) -> Rows:
    write_results("s", ROWS, scale="tiny", settings={"s/a": {"lr": 0.1}}, folder=folder)
    results = read_results("s", folder)
    assert results is not None
    assert (results.scale, results.settings) == ("tiny", {"s/a": {"lr": 0.1}})
    return results.rows


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = _stored(tmp_path)
    assert len(rows) == 5
    assert rows.values("variant") == ["a", "b"]
    assert rows["lower"][:3].tolist() == [1, 2, 4]
    assert np.isnan(rows["lower"][3:]).all()
    assert "upper" in rows and "mean" not in rows
    assert [path.name for path in tmp_path.iterdir()] == ["s.parquet"]


def test_selecting_and_averaging(tmp_path: Path) -> None:
    rows = _stored(tmp_path)
    assert len(rows.where(variant="a", width=4)) == 3
    last = rows.last()
    assert last["step"].tolist() == [9, 7, 9, 9]
    line = last.average("width", "lower")
    assert (line.x.tolist(), line.mean.tolist()) == ([4], [3])
    assert line.std.tolist() == pytest.approx([2**0.5])
    grid, matrix = last.by_seed("width", "lower")
    assert (grid.tolist(), matrix.tolist()) == ([4], [[2], [4]])
    assert len(rows.where(variant="none")) == 0


def test_what_is_missing_empty_or_damaged(tmp_path: Path) -> None:
    assert read_results("other", tmp_path) is None
    with pytest.raises(StoreError, match="no run has a score"):
        write_results("s", [], scale="tiny", settings={}, folder=tmp_path)
    results_path("s", tmp_path).write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(StoreError, match="not a file of results"):
        read_results("s", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        write_results("s", ROWS, scale="tiny", settings={}, folder=tmp_path / "file" / "below")

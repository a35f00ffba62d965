from __future__ import annotations

import csv
import json
import math

import pyarrow.parquet as pq
import pytest

from lipfast.errors import ArgumentError, StoreError
from lipfast.scoring import export_scores, read_scores
from tests.support.toy_rows import error_row, row, write


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "s", [row(upper=math.inf), error_row("file:///b.pt", metadata='{"a":"x,y"}')])
    return tmp_path / "s"


def test_csv(store, tmp_path):
    assert export_scores(store, tmp_path / "a.csv") == 2
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["uri"] for r in rows] == ["file:///a.pt", "file:///b.pt"]
    assert float(rows[0]["upper"]) == math.inf
    assert rows[1]["meta.a"] == "x,y"
    assert export_scores(store, tmp_path / "layers.csv", "layers") == 2
    with (tmp_path / "layers.csv").open(newline="") as stream:
        assert [json.loads(r["shape"]) for r in csv.DictReader(stream)] == [[3, 2], [3, 2]]


def test_json_lines_and_parquet(store, tmp_path):
    export_scores(store, tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["upper"] for line in lines] == ["inf", None]
    export_scores(store, tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").equals(read_scores(store))


def test_what_cannot_be_exported(store, tmp_path):
    with pytest.raises(ArgumentError, match=r"expected an ending \.csv, \.jsonl, \.parquet"):
        export_scores(store, tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(ArgumentError, match="is there already"):
        export_scores(store, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "mine"
    assert export_scores(store, tmp_path / "a.csv", overwrite=True) == 2
    with pytest.raises(StoreError, match="cannot write"):
        export_scores(store, tmp_path / "missing" / "a.csv")
    with pytest.raises(ArgumentError, match="table must be"):
        export_scores(store, tmp_path / "b.csv", "rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "s"]

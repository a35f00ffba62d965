"""Stores of the first version stay readable, and are written to as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lipfast.errors import StoreError
from lipfast.scoring.compact import compact_store
from lipfast.scoring.done import completed
from lipfast.scoring.schema import SCHEMA, VERSION, schema_of, upgraded
from lipfast.scoring.scores import read_scores
from lipfast.scoring.verify import verify_store
from tests.support.toy_rows import row, write


def old_store(folder: Path) -> Path:
    """As version 1 wrote it: its columns, its schema.json."""
    folder.mkdir()
    schema = schema_of(1)
    assert len(schema) == 32
    columns = {field.name: str(field.type) for field in schema}
    content = {"format": "lipfast scores", "version": 1, "columns": columns}
    (folder / "schema.json").write_text(json.dumps(content))
    table = pa.Table.from_pylist([row(), row("file:///b.pt", status="error", error="x")], schema)
    pq.write_table(table, folder / "part-00000000000000000001-00000000.parquet")
    return folder


def test_an_old_store_reads_as_a_new_one(tmp_path):
    store = old_store(tmp_path / "s")
    table = read_scores(store)
    assert table["uri"].to_pylist() == ["file:///a.pt", "file:///b.pt"]
    assert table["kind"].null_count == 2
    assert read_scores(store, "layers").num_rows == 4
    assert verify_store(store).problems == ()
    assert list(completed(store).scored) == [("file:///a.pt", 10, 1.5)]
    assert completed(store).failed == {}


@pytest.mark.parametrize("version", range(1, VERSION))
def test_a_store_of_each_version_is_read(tmp_path, version):
    old = schema_of(version)
    pq.write_table(pa.Table.from_pylist([row()], old), tmp_path / "part-1.parquet")
    write(tmp_path / "new", [row()])
    (tmp_path / "part-1.parquet").rename(tmp_path / "new" / "part-0.parquet")
    rows = read_scores(tmp_path / "new").to_pylist()
    assert [(r["upper"], r["reading"]) for r in rows] == [(2.0, None)]


def test_a_new_writer_goes_on_in_an_old_store(tmp_path):
    store = old_store(tmp_path / "s")
    old_part = next(store.glob("part-*")).read_bytes()
    write(store, [row("file:///c.pt", at=5)])
    assert json.loads((store / "schema.json").read_text())["version"] == VERSION
    assert min(store.glob("part-*")).read_bytes() == old_part
    assert read_scores(store).num_rows == 3
    compact_store(store)
    (part,) = store.glob("part-*")
    assert pq.read_schema(part).equals(SCHEMA)
    assert read_scores(store).num_rows == 3


def test_other_columns_are_refused(tmp_path):
    assert upgraded(SCHEMA.empty_table().drop_columns(["uri"])) is None
    write(tmp_path, [row()])
    (part,) = tmp_path.glob("part-*")
    pq.write_table(pq.read_table(part).drop_columns(["uri"]), part)
    with pytest.raises(StoreError, match="has other columns than schema 1 to"):
        read_scores(tmp_path)

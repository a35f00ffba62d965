from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lipfast._version import __version__
from lipfast.checkpoints import CheckpointFile
from lipfast.errors import ArgumentError, StoreError
from lipfast.scoring.compact import compact_store
from lipfast.scoring.done import Done, completed
from lipfast.scoring.schema import READING, SCHEMA
from lipfast.scoring.scores import read_scores
from lipfast.scoring.show import overview_text, store_overview
from lipfast.scoring.store import StoreWriter
from lipfast.scoring.verify import verify_store
from tests.support.toy_rows import error_row, layer, row, write


def test_round_trip(tmp_path):
    write(tmp_path / "s", [row()])
    (scores,) = read_scores(tmp_path / "s").to_pylist()
    expected = row()
    del expected["metadata"], expected["layers"]
    assert scores == {
        **expected,
        "error": None,
        "kind": None,
        "given": None,
        "note": None,
        "reading": None,
        "upper_method": None,
        "arch": None,
        "data": None,
        "meta.width": 4,
    }
    layers = read_scores(tmp_path / "s", "layers").to_pylist()
    parent = {"uri": "file:///a.pt", "run": "r", "step": 1, "epoch": None, "fingerprint": "f"}
    assert layers == [{**parent, **layer(0)}, {**parent, **layer(2)}]


def test_files_are_plain_parquet_with_a_versioned_schema(tmp_path):
    write(tmp_path, [row()], [row("file:///b.pt")])
    parts = sorted(tmp_path.glob("*.parquet"))
    assert len(parts) == 2
    assert all(part.name.startswith("part-") for part in parts)
    assert pq.read_schema(parts[0]).equals(SCHEMA)
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema["version"] == 5
    assert list(schema["columns"]) == SCHEMA.names
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(p.name for p in parts), "schema.json"]


def test_empty_store(tmp_path):
    write(tmp_path)
    assert read_scores(tmp_path).num_rows == 0
    assert read_scores(tmp_path, "layers").num_rows == 0
    assert completed(tmp_path) == Done()
    assert verify_store(tmp_path).problems == ()


def test_newest_row_per_checkpoint_and_fingerprint(tmp_path):
    write(
        tmp_path,
        [row(at=5, upper=5.0), row(at=1, fingerprint="g", upper=9.0)],
        [row(at=2, upper=3.0), row("file:///b.pt", at=1, step=0)],
    )
    rows = read_scores(tmp_path).to_pylist()
    assert [(r["uri"], r["fingerprint"], r["upper"]) for r in rows] == [
        ("file:///b.pt", "f", 2.0),
        ("file:///a.pt", "f", 5.0),
        ("file:///a.pt", "g", 9.0),
    ]


def test_an_error_disappears_once_the_checkpoint_is_scored(tmp_path):
    write(tmp_path, [error_row(fingerprint="none")])
    assert read_scores(tmp_path).column("status").to_pylist() == ["error"]
    assert completed(tmp_path) == Done()
    write(tmp_path, [row(at=1)])
    assert read_scores(tmp_path).column("status").to_pylist() == ["ok"]
    write(tmp_path, [error_row(at=2, fingerprint="none")])
    assert sorted(read_scores(tmp_path).column("status").to_pylist()) == ["error", "ok"]
    assert read_scores(tmp_path, "layers").num_rows == 2


def test_completed_knows_file_and_fingerprint(tmp_path):
    write(tmp_path, [row(), row(at=1, fingerprint="g"), row("file:///b.pt", size=11)])
    assert completed(tmp_path).scored == {
        ("file:///a.pt", 10, 1.5): [("f", '{"width":4}'), ("g", '{"width":4}')],
        ("file:///b.pt", 11, 1.5): [("f", '{"width":4}')],
    }
    assert completed(tmp_path / "missing") == Done()


def as_now(metadata: object, size: int) -> str:
    return "f"


def file_at(uri: str) -> CheckpointFile:
    return CheckpointFile(uri, uri, 10, 1.5, "r")


@pytest.mark.parametrize(
    ("uri", "values", "counts"),
    [
        ("file:///a.safetensors", {}, True),
        ("file:///a.safetensors", {"note": "weights below 'net' taken"}, False),
        ("file:///a.safetensors.index.json", {}, False),
        ("file:///a.pt", {}, False),
        ("file:///a.pt", {"reading": READING - 1}, False),
        ("file:///a.pt", {"reading": READING, "note": "weights below 'net' taken"}, True),
    ],
)
def test_what_may_be_read_in_another_way_now_is_scored_again(tmp_path, uri, values, counts):
    write(tmp_path, [row(uri, **values)])
    assert completed(tmp_path).is_scored(file_at(uri), as_now) is counts
    write(tmp_path, [row(uri, at=1, upper=7.0, reading=READING)])
    assert completed(tmp_path).is_scored(file_at(uri), as_now)
    assert read_scores(tmp_path)["upper"].to_pylist() == [7.0]  # the new row is in its place


@pytest.mark.parametrize("kind", ["cannot be read", "NaN or infinite weights"])
@pytest.mark.parametrize("reading", [None, READING - 1, READING])
def test_what_could_not_be_read_then_is_tried_again(tmp_path, kind, reading):
    failed = error_row(kind=kind, reading=reading, lipfast_version=__version__)
    write(tmp_path, [failed])
    assert completed(tmp_path).has_failed(file_at("file:///a.pt"), as_now) is (reading == READING)


def test_scores_of_what_cannot_be_read_any_more_are_dropped(tmp_path):
    refused = error_row(at=2, kind="cannot be read", fingerprint="none", reading=READING)
    write(tmp_path, [row(), row(at=1, fingerprint="g"), row("file:///b.pt")], [refused])
    for _ in range(2):
        rows = read_scores(tmp_path).to_pylist()
        assert [(r["uri"], r["status"]) for r in rows] == [
            ("file:///a.pt", "error"),
            ("file:///b.pt", "ok"),
        ]
        compact_store(tmp_path)
    write(tmp_path, [row("file:///b.pt", at=3, reading=READING), {**refused, "size": 11}])
    assert read_scores(tmp_path)["status"].to_pylist().count("ok") == 1


def test_notes_are_shown(tmp_path):
    notes = [f"note {min(number, 6)}\n" for number in range(9)]
    write(tmp_path, [row(f"file:///{i}.pt", note=note) for i, note in enumerate(notes)])
    write(tmp_path, [row("file:///z.pt"), error_row("file:///y.pt", note="failed")])
    overview = store_overview(tmp_path)
    assert overview["noted"] == 9
    lines = overview_text(overview).splitlines()
    assert lines[1] == r"  3 scored with a note: note 6\x0a"
    assert lines[6] == "  9 have a note in all: the store's column 'note'"
    assert "failed" not in overview["notes"]


def test_metadata_columns_take_the_type_that_all_values_have(tmp_path):
    texts = [
        '{"a":1,"b":1,"c":true,"d":"x","e":1,"f":9223372036854775808,"g":"inf"}',
        '{"a":2,"b":0.5,"c":false,"d":"1","e":"one","f":1,"g":2.5}',
        '{"b":"nan","e":true}',
    ]
    write(tmp_path, [row(f"file:///{i}.pt", metadata=text) for i, text in enumerate(texts)])
    table = read_scores(tmp_path)
    types = [str(table.schema.field(f"meta.{name}").type) for name in "abcdefg"]
    assert types == ["int64", "double", "bool", "string", "string", "double", "double"]
    columns = table.to_pydict()
    assert columns["meta.a"] == [1, 2, None]
    assert columns["meta.b"][:2] == [1.0, 0.5]
    assert math.isnan(columns["meta.b"][2])
    assert columns["meta.e"] == ["1", "one", "true"]
    assert columns["meta.g"] == [math.inf, 2.5, None]


def test_rows_are_committed_when_enough_wait(tmp_path):
    with StoreWriter(tmp_path, rows_per_part=3) as writer:
        writer.append([row(f"file:///{i}.pt") for i in range(2)])
        assert read_scores(tmp_path).num_rows == 0
        writer.append([row(f"file:///{i}.pt") for i in range(2, 4)])
        assert read_scores(tmp_path).num_rows == 4
    assert writer.rows_written == 4


def test_rows_are_committed_on_the_way_out_of_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path) as writer:
        writer.append([row()])
        raise KeyboardInterrupt
    assert read_scores(tmp_path).num_rows == 1


def test_a_failed_write_leaves_nothing_and_keeps_the_rows(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path)
    writer.append([row()])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write to the store .*: No space left"):
        writer.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["schema.json"]
    monkeypatch.undo()
    writer.flush()
    assert read_scores(tmp_path).num_rows == 1


def test_old_temporary_files_are_removed_new_ones_are_not(tmp_path):
    write(tmp_path, [row()])
    old, new = tmp_path / ".writing-old", tmp_path / ".writing-new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    write(tmp_path, [row("file:///b.pt")])
    assert (old.exists(), new.exists()) == (False, True)
    assert read_scores(tmp_path).num_rows == 2


@pytest.mark.parametrize("below", ["", "/deep/er"])
def test_a_file_in_the_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match=r"a file is in its place\. Choose another folder"):
        StoreWriter(f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write")
def test_an_unwritable_folder():
    with pytest.raises(StoreError, match=r"cannot (make|write to) the store '/proc/self/scores'"):
        StoreWriter("/proc/self/scores")
    with pytest.raises(StoreError, match="cannot write to the store '/proc/self'"):
        StoreWriter("/proc/self")


def test_unwritable_is_found_out_at_once_for_an_old_store_too(tmp_path, monkeypatch):
    def read_only(descriptor: int) -> None:
        raise OSError(30, "Read-only file system")

    write(tmp_path, [row()])
    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(StoreError, match=r"cannot write to the store .*: Read-only file system"):
        StoreWriter(tmp_path)


def test_unknown_schema_version(tmp_path):
    write(tmp_path, [row()])
    content = json.loads((tmp_path / "schema.json").read_text())
    (tmp_path / "schema.json").write_text(json.dumps({**content, "version": 99}))
    for use in (StoreWriter, read_scores, completed, verify_store):
        with pytest.raises(
            StoreError, match="schema version 99; this lipfast knows versions 1 to 5"
        ):
            use(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot read '.*schema.json'"), ('{"format":"other"}', "is not a store of scores")],
)
def test_damaged_schema_file(tmp_path, content, message):
    (tmp_path / "schema.json").write_text(content)
    for use in (StoreWriter, read_scores):
        with pytest.raises(StoreError, match=message):
            use(tmp_path)


def test_lost_schema_file(tmp_path):
    write(tmp_path, [row()])
    (tmp_path / "schema.json").unlink()
    with pytest.raises(StoreError, match=r"has lost its schema\.json"):
        StoreWriter(tmp_path)
    with pytest.raises(StoreError, match="is not a store"):
        completed(tmp_path)


def test_reading_what_is_no_store(tmp_path):
    with pytest.raises(StoreError, match=r"no store at '.*missing'"):
        read_scores(tmp_path / "missing")
    with pytest.raises(StoreError, match=r"is not a store: it has no schema\.json"):
        read_scores(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file; a store is a folder"):
        read_scores(tmp_path / "file")
    with pytest.raises(StoreError, match="must be a local folder, not 's3://"):
        StoreWriter("s3://bucket/scores")
    with pytest.raises(ArgumentError, match="table must be 'checkpoints' or 'layers'"):
        read_scores(tmp_path, "rows")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_corrupt_part_is_named(tmp_path, damage):
    write(tmp_path, [row()], [row("file:///b.pt")])
    part = sorted(tmp_path.glob("part-*"))[0]
    data = bytearray(part.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[10] ^= 0xFF
    elif damage == "empty":
        data = bytearray()
    else:
        foreign = pq.read_table(part).select(["uri"])
        pq.write_table(foreign, part)
        data = bytearray(part.read_bytes())
    part.write_bytes(bytes(data))
    for use in (read_scores, verify_store):
        if use is verify_store:
            found = verify_store(tmp_path)
            assert (found.parts, found.rows, len(found.problems)) == (2, 1, 1)
            assert part.name in found.problems[0]
            continue
        with pytest.raises(StoreError, match=f"part '.*{part.name}' (is corrupt|has other)"):
            use(tmp_path)


def test_verify_checks_what_rows_promise(tmp_path):
    write(
        tmp_path,
        [
            row(),
            row("file:///b.pt", lower=3.0),
            row("file:///c.pt", lower=3.0, lower_certified=False),
            error_row("file:///d.pt", error=None),
            row("file:///e.pt", upper=None),
            row("file:///f.pt", status="maybe"),
        ],
    )
    problems = verify_store(tmp_path).problems
    assert [problem.split("file:///")[1].split(".pt")[0] for problem in problems] == list("bdef")


def test_a_store_must_be_a_path():
    with pytest.raises(StoreError, match="path of a folder, not 3"):
        read_scores(3)

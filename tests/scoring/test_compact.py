from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from lipfast.errors import StoreError
from lipfast.scoring import compact
from lipfast.scoring.compact import Compaction, compact_store
from lipfast.scoring.scores import read_scores
from lipfast.scoring.store import StoreWriter, parts
from lipfast.scoring.verify import verify_store
from tests.support.toy_rows import error_row, row, write


def fill(store: Path) -> None:
    write(
        store,
        [row(), row("file:///b.pt")],
        [row(at=1, upper=3.0), error_row("file:///c.pt")],
        [row("file:///c.pt", at=2)],
    )


def test_readers_see_the_same_before_and_after(tmp_path):
    fill(tmp_path)
    before = read_scores(tmp_path), read_scores(tmp_path, "layers")
    assert compact_store(tmp_path) == Compaction(3, 1, 5, 3)
    assert (read_scores(tmp_path), read_scores(tmp_path, "layers")) == before
    assert verify_store(tmp_path).problems == ()
    part = parts(tmp_path)
    assert compact_store(tmp_path) == Compaction(1, 1, 3, 3)
    assert parts(tmp_path) == part


def test_large_stores_become_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(compact, "ROWS_PER_PART", 2)
    fill(tmp_path)
    assert compact_store(tmp_path).parts_after == 2
    assert read_scores(tmp_path).num_rows == 3


@pytest.mark.parametrize("deletions", [0, 1, 2])
def test_killed_while_it_deletes(tmp_path, monkeypatch, deletions):
    fill(tmp_path)
    before = read_scores(tmp_path)
    done = []

    def stop(part: Path) -> None:
        if len(done) == deletions:
            raise KeyboardInterrupt
        done.append(part)
        part.unlink()

    monkeypatch.setattr(compact, "_delete", stop)
    with pytest.raises(KeyboardInterrupt):
        compact_store(tmp_path)
    monkeypatch.undo()
    assert read_scores(tmp_path) == before
    compact_store(tmp_path)
    assert len(parts(tmp_path)) == 1
    assert read_scores(tmp_path) == before


def test_a_corrupt_part_leaves_the_store_as_it_is(tmp_path):
    fill(tmp_path)
    last = parts(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:40])
    there = parts(tmp_path)
    with pytest.raises(StoreError, match=f"{last.name}' is corrupt"):
        compact_store(tmp_path)
    assert parts(tmp_path) == there


def test_a_full_disk_leaves_the_store_as_it_is(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    fill(tmp_path)
    before = read_scores(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        compact_store(tmp_path)
    assert len(parts(tmp_path)) == 3
    assert read_scores(tmp_path) == before


def test_what_was_compacted_and_put_back_is_not_shown_twice(tmp_path):
    fill(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    before = read_scores(tmp_path / "s")
    compact_store(tmp_path / "s")
    for part in parts(tmp_path / "copy"):
        shutil.copy(part, tmp_path / "s")
    assert read_scores(tmp_path / "s") == before


def test_readers_and_writers_go_on_meanwhile(tmp_path):
    write(tmp_path, *([row(f"file:///{i}.pt")] for i in range(20)))
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                assert read_scores(tmp_path).num_rows >= 20
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(5):
        with StoreWriter(tmp_path) as writer:
            writer.append([row(f"file:///new{i}.pt")])
        compact_store(tmp_path)
    stop.set()
    reader.join()
    assert failures == []
    assert read_scores(tmp_path).num_rows == 25

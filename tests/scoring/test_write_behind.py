from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lipfast.errors import StoreError
from lipfast.scoring import Progress, score, store
from lipfast.scoring.scores import read_scores
from lipfast.scoring.verify import verify_store
from lipfast.scoring.write_behind import WriteBehind
from tests.support.toy_rows import row


def wait_for(path: Path, count: int) -> None:
    limit = time.monotonic() + 60
    while len(list(path.glob("part-*"))) < count:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_rows_are_committed_though_nothing_follows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_FIRST_INTERVAL", 0.0)
    monkeypatch.setattr(store, "_SHARE", 0.0)
    with WriteBehind(tmp_path) as writer:
        writer.append([row()])
        wait_for(tmp_path, 1)
        assert read_scores(tmp_path).num_rows == 1
        writer.append([row("file:///b.pt")])
    assert read_scores(tmp_path).num_rows == 2
    assert writer.seconds > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_everything_is_committed_on_the_way_out_of_an_error(tmp_path, error):
    with pytest.raises(error), WriteBehind(tmp_path) as writer:
        writer.append([row()])
        raise error
    assert read_scores(tmp_path).num_rows == 1


def test_everything_is_committed_though_ctrl_c_comes_on_the_way_out(tmp_path, monkeypatch):
    writer = WriteBehind(tmp_path)
    put, presses = writer._queue.put, [KeyboardInterrupt]

    def interrupted(rows):
        if presses:
            raise presses.pop()
        put(rows)

    with pytest.raises(KeyboardInterrupt), writer:
        writer.append([row()])
        monkeypatch.setattr(writer._queue, "put", interrupted)
    assert read_scores(tmp_path).num_rows == 1


def test_a_failed_write_reaches_who_appends(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_FIRST_INTERVAL", 0.0)
    monkeypatch.setattr(store, "_SHARE", 0.0)
    writer = WriteBehind(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"), writer:
        while True:
            writer.append([row()])
            time.sleep(0.01)
    monkeypatch.undo()
    assert read_scores(tmp_path).num_rows == 0


FULL = """
import resource, signal, sys, torch
from lipfast.errors import StoreError
from lipfast.scoring import score, store

store._FIRST_INTERVAL = store._SHARE = 0.0
archive, out = sys.argv[1:]
x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
seen = []
def progress(at):
    seen.append(at)
    if len(seen) == 2:  # from here on no file can grow beyond a kilobyte: the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    score(archive, arch="lipfast_toy_models:mlp", data=x, out=out, batch_size=2, progress=progress)
except StoreError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.long
def test_a_disk_that_fills_up_in_the_middle(toy_models, archive, samples, tmp_path):
    command = [sys.executable, "-c", FULL, str(archive), str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert process.returncode == 7, process.stderr
    assert "cannot write to the store" in process.stdout
    assert "free space" in process.stdout
    assert verify_store(tmp_path / "s").problems == ()
    kept = read_scores(tmp_path / "s").num_rows
    assert kept < 12
    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s")
    assert (summary.scored, summary.skipped) == (12 - kept, kept)
    assert read_scores(tmp_path / "s").num_rows == 12


def test_a_scorer_in_the_middle_of_another(toy_models, archive, samples, tmp_path):
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s", "batch_size": 2}
    inner = []

    def at_once(at: Progress) -> None:
        if at.done == 4:
            inner.append(score(archive, **arguments))

    outer = score(archive, **arguments, progress=at_once)
    assert (outer.scored, inner[0].scored + inner[0].skipped) == (12, 12)
    assert read_scores(tmp_path / "s").num_rows == 12
    assert verify_store(tmp_path / "s").problems == ()


@pytest.mark.long
def test_two_scorers_at_once(toy_models, archive, samples, tmp_path):
    script = (
        "import sys, torch\n"
        "from lipfast.scoring import score, store\n"
        "store._FIRST_INTERVAL = store._SHARE = 0.0\n"
        "x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))\n"
        "score(sys.argv[1], arch='lipfast_toy_models:mlp', data=x, out=sys.argv[2], batch_size=2)\n"
    )
    command = [sys.executable, "-c", script, str(archive), str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)
    ]
    assert [process.communicate()[1] for process in processes] == [b"", b""]
    assert [process.returncode for process in processes] == [0, 0]
    table = read_scores(tmp_path / "s")
    assert table.num_rows == len(set(table["uri"].to_pylist())) == 12
    assert set(table["status"].to_pylist()) == {"ok"}
    assert verify_store(tmp_path / "s").problems == ()

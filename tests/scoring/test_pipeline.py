from __future__ import annotations

import itertools
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lipfast
from lipfast.checkpoints import CheckpointFile, find_checkpoints
from lipfast.errors import ArchiveError, ArgumentError, NonFiniteError, StoreError
from lipfast.estimators.plan import Plan
from lipfast.scoring import Interrupted, Progress, read_scores, score, verify_store
from lipfast.scoring.data import load_data
from lipfast.scoring.engine import local
from lipfast.scoring.options import Options
from lipfast.scoring.reading import Reading
from lipfast.scoring.recipe import Recipe
from lipfast.scoring.where import Where
from tests.support.toy_archive import toy_state, write_toy


def rows_by_name(store: Path) -> dict[str, dict]:
    return {Path(row["uri"]).name: row for row in read_scores(store).to_pylist()}


def test_scores_are_those_of_the_public_calls(toy_models, archive, samples, tmp_path):
    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s")
    assert (summary.found, summary.scored, summary.failed, summary.skipped) == (12, 12, 0, 0)
    assert summary.plans == 2
    seconds = summary.seconds
    assert {"find", "read", "upper", "lower", "write", "total"} <= set(seconds)
    assert 0 < seconds["ops"] < seconds["upper"] + seconds["lower"]
    share = f"{seconds['ops'] / seconds['total']:.0%} of the time inside spectral_norms and"
    assert share in str(summary)
    for row in read_scores(tmp_path / "s").to_pylist():
        width, seed = row["meta.width"], row["meta.seed"]
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        model.load_state_dict(toy_state(width, seed))
        expected = lipfast.bounds(model, samples)
        assert row["status"] == "ok"
        assert row["upper"] == pytest.approx(expected.upper.value, rel=1e-6)
        assert row["log_upper"] == pytest.approx(math.log(row["upper"]))
        assert row["lower"] == pytest.approx(expected.lower.value, rel=1e-6)
        assert row["jacobian_max"] == pytest.approx(expected.lower.jacobian.value, rel=1e-5)
        assert row["mean"] == pytest.approx(expected.mean, rel=1e-5)
        assert row["rms"] == pytest.approx(expected.rms, rel=1e-5)
        assert 0 < row["lower"] <= row["upper"]
        assert row["upper_certified"]
        assert row["lower_certified"]
        assert row["samples"] == 7
        assert 0 <= row["lower_sample"] < 7


def test_layers_and_provenance(toy_models, archive, samples, tmp_path):
    score(archive, arch=toy_models, data=samples, out=tmp_path / "s", seed=3, limit=1)
    (row,) = read_scores(tmp_path / "s").to_pylist()
    assert row["lipfast_version"] == lipfast.__version__
    assert row["torch_version"] == torch.__version__
    assert row["capability"] == lipfast.info()["capability"]
    assert (row["seed"], row["norm"], row["arch"], row["data"]) == (3, 2.0, toy_models, "<tensor>")
    file = Path(row["uri"].removeprefix("file://"))
    assert (row["size"], row["mtime"]) == (file.stat().st_size, file.stat().st_mtime)
    assert row["scored_at"].timestamp() >= row["mtime"]
    layers = read_scores(tmp_path / "s", "layers").to_pylist()
    assert [(layer["index"], layer["kind"], layer["shape"]) for layer in layers] == [
        (0, "linear", [4, 4]),
        (1, "linear", [3, 4]),
    ]
    weight = toy_state(4)["0.weight"].double()
    sigma = torch.linalg.matrix_norm(weight, ord=2).item()
    assert layers[0]["lower"] <= sigma <= layers[0]["upper"]
    assert layers[0]["certified"]


def test_run_and_step_come_from_the_metadata_or_the_folder(toy_models, archive, samples, tmp_path):
    write_toy(archive / "named" / "a.safetensors", 4, run="my run", step=5, epoch=1.5)
    score(archive, arch=toy_models, data=samples, out=tmp_path / "s")
    rows = read_scores(tmp_path / "s").to_pylist()
    assert [(row["run"], row["step"]) for row in rows[:4]] == [
        ("my run", 5),
        ("w4s0", 1),
        ("w4s0", 2),
        ("w4s0", 10),
    ]
    assert rows[0]["epoch"] == 1.5


@pytest.mark.parametrize("norm", [1, math.inf])
def test_other_norms(toy_models, archive, samples, tmp_path, norm):
    score(archive, arch=toy_models, data=samples, out=tmp_path / "s", norm=norm, limit=1)
    (row,) = read_scores(tmp_path / "s").to_pylist()
    state = toy_state(4)
    expected = math.prod(
        torch.linalg.matrix_norm(state[name].double(), ord=norm).item()
        for name in ("0.weight", "2.weight")
    )
    assert row["norm"] == norm
    assert row["lower"] <= row["upper"] < expected


def test_batches_do_not_change_scores(toy_models, archive, samples, tmp_path):
    for size in (1, 2, 64):
        score(archive, arch=toy_models, data=samples, out=tmp_path / f"{size}", batch_size=size)
    tables = [read_scores(tmp_path / f"{size}") for size in (1, 2, 64)]
    for name in ("uri", "fingerprint", "lower_sample"):
        assert tables[0][name].equals(tables[1][name])
        assert tables[0][name].equals(tables[2][name])
    for name in ("upper", "lower", "mean"):
        for table in tables[1:]:
            assert table[name].to_pylist() == pytest.approx(tables[0][name].to_pylist(), rel=1e-6)


def test_windows_do_not_lose_files(toy_models, archive, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "WINDOW_FILES", 5)
    seen: list[Progress] = []
    score(archive, arch=toy_models, data=samples, out=tmp_path / "a", progress=seen.append)
    assert read_scores(tmp_path / "a").num_rows == 12
    assert seen[-1] == Progress(done=12, total=12, failed=0, skipped=0)
    assert [at.done for at in seen] == sorted(at.done for at in seen)
    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "b", memory=1)
    assert summary.scored == 12


def test_readers_step_back_and_the_scorer_does_not(
    toy_models, archive, samples, tmp_path, monkeypatch
):
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, seen, genuine = priority(), [], local.read

    def read(file: CheckpointFile, prefix: str | None) -> Reading:
        seen.append(priority())
        return genuine(file)

    monkeypatch.setattr(local, "read", read)
    monkeypatch.setattr(local, "SMALL_BYTES", 0)
    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s")
    assert (summary.scored, len(seen), priority()) == (12, 12, before)
    lower = min(before + 10, 19) if sys.platform == "linux" else before
    assert set(seen) == {lower}
    assert 0 <= summary.seconds["wait"] <= summary.seconds["total"]


# (which file has to be waited for, files of a window)
@pytest.mark.parametrize("case", list(itertools.product((0, 1, 7, 100), (3, 5, 512))))
def test_small_files_are_read_between_batches_until_they_are_waited_for(
    toy_models, archive, samples, tmp_path, case
):
    waits, window = case
    own, readers, genuine, clock = threading.get_ident(), [], local.read, [0.0]

    def read(file: CheckpointFile, prefix: str | None) -> Reading:
        clock[0] += len(readers) == waits
        readers.append(threading.get_ident())
        return genuine(file, prefix)

    still = SimpleNamespace(perf_counter=lambda: clock[0], thread_time=lambda: 0.0)
    # Two files are read before one looks.
    with mock.patch.multiple(local, time=still, read=read, _HANDED_OVER=2, WINDOW_FILES=window):
        summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s")
    assert summary.scored == read_scores(tmp_path / "s").num_rows == len(readers) == 12
    looks = {
        2,
        *(
            min(start + at, start + window, 12)
            for start in range(2, 12, window)
            for at in range(2, window + 2, 2)
        ),
    }
    here = min((at for at in looks if at > waits), default=12)
    assert [reader == own for reader in readers[:here]] == [True] * here
    assert own not in readers[here:]


def test_more_threads_read_where_each_file_costs_a_round_trip(toy_models, samples, tmp_path):
    memory = fsspec.filesystem("memory")
    together = threading.Barrier(local.READERS + 1)  # so many must read at the same time

    class Slow(type(memory)):  # type: ignore[misc]
        def cat_file(self, path: str, *args: object, **options: object) -> bytes:
            together.wait(timeout=60)
            return bytes(super().cat_file(path, *args, **options))

    paths = [f"/lipfast-slow/r/step{step}.safetensors" for step in range(local.READERS + 1)]
    for step, path in enumerate(paths):
        written = write_toy(tmp_path / "a.safetensors", 4, step=step)
        memory.pipe(path, written.read_bytes())
    try:
        found = find_checkpoints("memory://lipfast-slow")
        slow = [replace(file, filesystem=Slow()) for file in found]
        recipe = Recipe(toy_models, None, load_data(samples), Options())
        engine = local.LocalEngine(recipe.scorer(), 1 << 30, Where())
        rows = [row for batch in engine.run(slow) for row in batch]
    finally:
        memory.rm("/lipfast-slow", recursive=True)
    assert [row["status"] for row in rows] == ["ok"] * len(paths)


def test_torch_files_of_wrapped_models(toy_models, samples, tmp_path):
    root = tmp_path / "archive"
    root.mkdir()
    state = toy_state(4)
    for index, prefix in enumerate(("", "module.", "_orig_mod.", "module._orig_mod.")):
        content = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({"state_dict": content, "width": 4, "step": index}, root / f"{index}.pt")
    summary = score(root, arch=toy_models, data=samples, out=tmp_path / "s")
    assert (summary.scored, summary.failed) == (4, 0)
    table = read_scores(tmp_path / "s")
    assert len(set(table["upper"].to_pylist())) == 1
    assert table["step"].to_pylist() == [0, 1, 2, 3]


def test_remote_archives(toy_models, archive, samples, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in archive.rglob("*1.safetensors"):
        memory.pipe(f"/lipfast-runs/{path.relative_to(archive)}", path.read_bytes())
    try:
        arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s"}
        assert score("memory://lipfast-runs", **arguments).scored == 4
        assert score("memory://lipfast-runs", **arguments).skipped == 4
    finally:
        memory.rm("/lipfast-runs", recursive=True)
    assert read_scores(tmp_path / "s")["uri"][0].as_py().startswith("memory://")


# Resuming


def test_a_second_run_skips_everything(toy_models, archive, samples, tmp_path):
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s"}
    assert score(archive, **arguments, limit=5).scored == 5
    summary = score(archive, **arguments)
    assert (summary.scored, summary.skipped) == (7, 5)
    parts = sorted((tmp_path / "s").iterdir())
    summary = score(archive, **arguments)
    assert (summary.scored, summary.skipped) == (0, 12)
    assert sorted((tmp_path / "s").iterdir()) == parts


def test_a_changed_file_is_scored_again(toy_models, archive, samples, tmp_path):
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s"}
    score(archive, **arguments)
    before = read_scores(tmp_path / "s").num_rows
    path = write_toy(archive / "w4s0" / "step1.safetensors", 4, seed=9, step=1)
    os.utime(path, (1, 1))
    summary = score(archive, **arguments)
    assert (summary.scored, summary.skipped) == (1, 11)
    table = read_scores(tmp_path / "s")
    assert table.num_rows == before
    assert 1.0 in table["mtime"].to_pylist()


@pytest.mark.parametrize(
    "change", [{"norm": 1}, {"seed": 1}, {"data": torch.ones(2, 4)}, {"arch_args": {"depth": 2}}]
)
def test_other_options_are_other_scores(toy_models, archive, samples, tmp_path, change):
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s", "limit": 1}
    score(archive, **arguments)
    summary = score(archive, **{**arguments, **change})
    assert (summary.scored + summary.failed, summary.skipped) == (1, 0)
    assert read_scores(tmp_path / "s").num_rows == 2


def test_other_code_is_another_plan(toy_models, archive, samples, tmp_path):
    def plain(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def leaky(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.LeakyReLU(), nn.Linear(width, 3))

    leaky.__qualname__ = plain.__qualname__
    score(archive, arch=plain, data=samples, out=tmp_path / "s")
    assert score(archive, arch=plain, data=samples, out=tmp_path / "s").skipped == 12
    assert score(archive, arch=leaky, data=samples, out=tmp_path / "s").skipped == 0


KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from lipfast.scoring import score, store

store._FIRST_INTERVAL = store._SHARE = 0.0  # commit after every batch
archive, out, when = sys.argv[1:]
rename = Path.replace

def kill(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)

def replace(self, target):
    if "part-" in str(target) and len(list(Path(out).glob("part-*"))) == 3:
        kill()
    return rename(self, target)

if when == "before a part is renamed":
    Path.replace = replace
x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
seen = []
def progress(at):
    seen.append(at)
    if when == "between batches" and at.done >= 6:
        while len(list(Path(out).glob("part-*"))) < 3:  # until the writer has caught up
            time.sleep(0.01)
        kill()
score(archive, arch="lipfast_toy_models:mlp", data=x, out=out, batch_size=2, progress=progress)
"""


@pytest.mark.parametrize("when", ["between batches", "before a part is renamed"])
def test_killed_and_resumed(toy_models, archive, samples, tmp_path, when):
    store = tmp_path / "s"
    command = [sys.executable, "-c", KILLED, str(archive), str(store), when]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    before = read_scores(store).to_pylist()
    assert [row["status"] for row in before] == ["ok"] * 6
    assert verify_store(store).problems == ()
    leftovers = list(store.glob(".writing-*"))
    assert len(leftovers) == (when == "before a part is renamed")
    summary = score(archive, arch=toy_models, data=samples, out=store)
    assert (summary.scored, summary.skipped) == (6, 6)
    after = read_scores(store).to_pylist()
    assert len(after) == 12
    assert all(row in after for row in before)


def test_an_interrupt_commits_what_is_done(toy_models, archive, samples, tmp_path):
    def interrupt(at: Progress) -> None:
        if at.done >= 6:
            raise KeyboardInterrupt

    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s", "batch_size": 2}
    with pytest.raises(KeyboardInterrupt) as pressed:
        score(archive, **arguments, progress=interrupt)
    assert isinstance(pressed.value, Interrupted)
    assert (pressed.value.summary.scored, pressed.value.summary.found) == (6, 12)
    assert pressed.value.summary.seconds["total"] > 0
    assert read_scores(tmp_path / "s").num_rows == 6
    assert score(archive, **arguments).skipped == 6


# Bad checkpoints: a row with the reason, and the run goes on


def test_bad_checkpoints_become_rows(toy_models, archive, samples, tmp_path):
    bad = archive / "bad"
    for name in ("truncated", "nan", "inf", "shape", "names", "good"):
        write_toy(bad / f"{name}.safetensors", 4)
    data = (bad / "truncated.safetensors").read_bytes()
    (bad / "truncated.safetensors").write_bytes(data[:-10])
    for name, value in (("nan", math.nan), ("inf", math.inf)):
        state = toy_state(4)
        state["2.weight"][1, 2] = value
        save_file(state, bad / f"{name}.safetensors", metadata={"width": "4"})
    save_file(toy_state(5), bad / "shape.safetensors", metadata={"width": "4"})
    save_file({"foo": torch.ones(2)}, bad / "names.safetensors", metadata={"width": "4"})
    save_file(toy_state(4), bad / "nometadata.safetensors")
    proof = tmp_path / "proof"
    (bad / "evil.pt").write_bytes(pickle.dumps(Evil(str(proof)), 2))
    (bad / "link.pt").symlink_to(tmp_path / "nowhere")

    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s")

    assert (summary.found, summary.scored, summary.failed) == (20, 13, 7)
    assert summary.reasons == {
        "cannot be read": 2,
        "NaN or infinite weights": 2,
        "state dict does not match the architecture": 2,
        "architecture or data does not fit": 1,
    }
    assert list(summary.examples) == list(summary.reasons)
    assert not proof.exists()
    rows = rows_by_name(tmp_path / "s")
    messages = {
        "truncated.safetensors": ["truncated"],
        "nan.safetensors": ["2.weight"],
        "inf.safetensors": ["2.weight"],
        "shape.safetensors": ["0.weight", "(5, 4)", "(4, 4)"],
        "names.safetensors": ["0.weight", "foo"],
        "nometadata.safetensors": ["'width'", "its keys: none", "--arch-arg"],
        "evil.pt": ["evil.pt"],
    }
    for name, words in messages.items():
        row = rows[name]
        assert row["status"] == "error"
        assert row["upper"] is None
        assert row["lower"] is None
        assert all(word in row["error"] for word in words), row["error"]
        assert "state dict 0" not in row["error"]
    assert rows["good.safetensors"]["status"] == "ok"
    assert read_scores(tmp_path / "s", "layers").num_rows == 2 * 13


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_failed_checkpoints_are_tried_again_when_asked_or_changed(
    toy_models, archive, samples, tmp_path
):
    path = archive / "w4s0" / "step1.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s"}
    assert score(archive, **arguments).failed == 1
    summary = score(archive, **arguments)
    assert (summary.skipped, summary.failed, summary.failed_before) == (11, 0, 1)
    assert "1 failed before: --retry-failed tries them again" in str(summary)
    summary = score(archive, **arguments, retry_failed=True)
    assert (summary.skipped, summary.failed, summary.failed_before) == (11, 1, 0)
    path.write_bytes(good)
    summary = score(archive, **arguments)
    assert (summary.skipped, summary.scored) == (11, 1)
    assert read_scores(tmp_path / "s")["status"].to_pylist() == ["ok"] * 12


def test_an_unforeseen_failure_does_not_take_its_batch_along(
    toy_models, archive, samples, tmp_path, monkeypatch
):
    genuine = Plan.lower
    victim = toy_state(4, seed=1)["0.weight"]

    def lower(self, state_dicts, x, **options):
        if any(torch.equal(state["0.weight"], victim) for state in state_dicts):
            raise RuntimeError("out of luck")
        return genuine(self, state_dicts, x, **options)

    monkeypatch.setattr(Plan, "lower", lower)
    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s")
    assert (summary.scored, summary.failed) == (9, 3)
    assert summary.reasons == {"RuntimeError": 3}
    rows = read_scores(tmp_path / "s").to_pylist()
    failed = [row for row in rows if row["status"] == "error"]
    assert {row["run"] for row in failed} == {"w4s1"}
    assert failed[0]["error"] == "RuntimeError: out of luck"


def test_text_that_is_not_utf8_or_steers_terminals(toy_models, samples, tmp_path):
    root = tmp_path / "archive"
    write_toy(root / "a\x1b[31m.safetensors", 4, run="run\x1b[2J")
    foreign = os.fsdecode(os.fsencode(root) + b"/\xff\x1b.safetensors")
    (root / "a\x1b[31m.safetensors").rename(foreign)
    torch.save({"state_dict": toy_state(4), "width": 4, "run": "\ud800"}, root / "b.pt")
    assert score(root, arch=toy_models, data=samples, out=tmp_path / "s").scored == 2
    table = read_scores(tmp_path / "s").to_pydict()
    assert sorted(Path(uri).name for uri in table["uri"]) == ["\\xff\\x1b.safetensors", "b.pt"]
    assert "\\ud800" in table["run"]


# Wrong calls: an error, and nothing is written


def test_no_plan_at_all_is_an_error_of_the_call(toy_models, archive, samples, tmp_path):
    with pytest.raises(ArgumentError, match="raised RuntimeError: no such model"):
        score(archive, arch="lipfast_toy_models:broken", data=samples, out=tmp_path / "s")
    with pytest.raises(ArgumentError, match=r"cannot be evaluated on samples of shape \(5,\)"):
        score(archive, arch=toy_models, data=torch.ones(2, 5), out=tmp_path / "s")
    assert read_scores(tmp_path / "s").num_rows == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"engine": "cloud"}, ArgumentError, "engine 'cloud': expected local"),
        ({"norm": 3}, ArgumentError, "norm must be 1, 2 or inf"),
        ({"batch_size": 0}, ArgumentError, "batch_size 0: expected at least 1"),
        ({"limit": 0}, ArgumentError, "limit 0"),
        ({"memory": 0}, ArgumentError, "memory 0"),
        ({"data": torch.ones(2, 4, dtype=torch.int32)}, ArgumentError, "dtype int32"),
        ({"data": torch.full((2, 4), math.nan)}, NonFiniteError, "sample 0"),
        ({"data": "missing.npy"}, ArgumentError, r"no data at 'missing\.npy'"),
        ({"arch": "no_such_module:f"}, ArgumentError, "importing 'no_such_module'"),
        ({"arch_args": {"wdith": 3}}, ArgumentError, "no parameter 'wdith'"),
    ],
)
def test_wrong_arguments(request, tmp_path, change, error, message):
    toy_models, archive, samples = map(
        request.getfixturevalue, ("toy_models", "archive", "samples")
    )
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s", **change}
    with pytest.raises(error, match=message):
        score(archive, **arguments)
    assert not (tmp_path / "s").exists()


def test_empty_archive_and_unwritable_store(toy_models, archive, samples, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArchiveError, match="no checkpoints in"):
        score(tmp_path / "empty", arch=toy_models, data=samples, out=tmp_path / "s")
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(StoreError, match=r"is a file|a file is in its place"):
            score(archive, arch=toy_models, data=samples, out=tmp_path / out)


def test_dry_run_writes_nothing_and_finds_bad_checkpoints(toy_models, archive, samples, tmp_path):
    (archive / "w4s0" / "step1.safetensors").write_bytes(b"")
    summary = score(archive, arch=toy_models, data=samples, out=tmp_path / "s", dry_run=True)
    assert (summary.scored, summary.failed) == (11, 1)
    assert not (tmp_path / "s").exists()
    assert "11 can be scored" in str(summary)
    assert "without --dry-run" in summary.next


def test_summary_says_what_to_type_next(toy_models, archive, samples, tmp_path):
    store = tmp_path / "my scores"
    summary = score(archive, arch=toy_models, data=samples, out=store, limit=2)
    assert summary.next == f"lipfast store show '{store}'"
    assert str(summary).splitlines()[0] == (
        "12 checkpoints: 2 scored, 0 already in the store, 0 failed"
    )
    assert summary.to_dict()["rate"] > 0


def test_global_state_is_left_as_it_was(toy_models, archive, samples, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads(), Path.cwd()
    score(archive, arch=toy_models, data=samples, out=tmp_path / "s", limit=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), torch.get_num_threads(), Path.cwd()) == before[1:]


def test_a_deleted_part_is_scored_again(toy_models, archive, samples, tmp_path):
    arguments = {"arch": toy_models, "data": samples, "out": tmp_path / "s"}
    score(archive, **arguments, limit=4)
    score(archive, **arguments)
    part = sorted((tmp_path / "s").glob("part-*"))[0]
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(StoreError, match=f"{part.name}' is corrupt: .* Move it out"):
        score(archive, **arguments)
    shutil.move(part, tmp_path / "aside")
    assert score(archive, **arguments).scored == 4


def test_the_error_of_most_checkpoints_is_the_one_that_is_raised(archive, samples, tmp_path):
    torch.save({"weight": torch.zeros(1)}, archive / "a_stray.pt")  # first, and has no metadata

    def broken(width: int) -> torch.nn.Module:
        raise RuntimeError("no such layer")

    with pytest.raises(ArgumentError, match="no such layer"):
        score(archive / "w4s0", arch=broken, data=samples, out=tmp_path / "s")
    with pytest.raises(ArgumentError, match="no such layer"):
        score(archive, arch=broken, data=samples, out=tmp_path / "s")


@pytest.mark.parametrize("change", [{"seed": "q"}, {"seed": -1}, {"seed": 2**70}, {"limit": 1.5}])
def test_options_of_the_wrong_type(archive, samples, tmp_path, change):
    with pytest.raises(ArgumentError, match="integer"):
        score(archive, arch="a:b", data=samples, out=tmp_path / "s", **change)

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.checkpoints import checkpoint_name, read_metadata, write_checkpoint
from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.errors import ConfigError
from experiments.models import fcn
from experiments.runs import load_model, runs
from experiments.sweep import (
    SweepFolder,
    finished,
    found_folder,
    open_sweep,
    read_metrics,
    run_name,
    train_sweep,
)
from experiments.train import LogRow, Network, initial_state, train_group
from lipfast.errors import LipfastError, StoreError

MakeConfig = Callable[..., SweepConfig]


@pytest.fixture(autouse=True)
def quick_data(
    monkeypatch: pytest.MonkeyPatch, small_data: ClassificationData
) -> Iterator[list[int]]:
    """Generating MNIST1D takes seconds; its own test does it."""
    calls: list[int] = []

    def instead(config: SweepConfig) -> ClassificationData:
        calls.append(config.train_size)
        return small_data

    monkeypatch.setattr("experiments.task.load_sweep_data", instead)
    yield calls


def _content(folder: SweepFolder) -> dict[str, tuple[dict[str, str], dict[str, torch.Tensor]]]:
    return {
        str(path.relative_to(folder.root)): (read_metadata(path), load_file(path))
        for path in sorted(folder.checkpoints.rglob("*.safetensors"))
    }


def _assert_same(first: SweepFolder, second: SweepFolder) -> None:
    a, b = _content(first), _content(second)
    assert a.keys() == b.keys()
    for name, (metadata, tensors) in a.items():
        assert b[name][0] == metadata
        assert all(torch.equal(b[name][1][key], tensor) for key, tensor in tensors.items())


def test_a_sweep_writes_what_the_scorer_reads(
    tmp_path: Path, make_config: MakeConfig, quick_data: list[int]
) -> None:
    config = make_config(bias=False, optimizer="adam")
    folder = open_sweep(config, tmp_path)
    summary = train_sweep(config, folder)
    assert (summary.trained, summary.skipped, summary.diverged) == (6, 0, ())
    assert summary.checkpoints == len(_content(folder)) == 6 * 3
    path = folder.run(Network(5, 1)) / "step_000006.safetensors"
    metadata = read_metadata(path)
    for key, value in {
        "run": run_name(Network(5, 1)),
        "step": "6",
        "epoch": "6.0",
        "seed": "1",
        "width": "5",
        "depth": "1",
        "inputs": "40",
        "classes": "10",
        "bias": "false",
        "loss": "cross_entropy",
        "optimizer": "adam",
        "lr": "0.01",
        "label_noise": "0.0",
        "train_size": "24",
    }.items():
        assert metadata[key] == value
    assert 0 < float(metadata["train_loss"]) < 10
    assert 0 <= float(metadata["test_error"]) <= 1
    fcn(5, bias=False).load_state_dict(load_file(path))
    assert list(folder.root.rglob("*.tmp")) == []
    assert quick_data == [24]


def test_a_second_run_does_nothing(
    tmp_path: Path, make_config: MakeConfig, quick_data: list[int]
) -> None:
    config = make_config()
    train_sweep(config, open_sweep(config, tmp_path))
    folder = open_sweep(config, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*.safetensors")}
    summary = train_sweep(config, folder)
    assert (summary.trained, summary.skipped, summary.checkpoints) == (0, 6, 18)
    assert times == {path: path.stat().st_mtime_ns for path in folder.root.rglob("*.safetensors")}
    assert quick_data == [24]


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("kill_after", [1, 7, 13, 17])
def test_resuming_after_a_kill_gives_the_same_checkpoints(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    kill_after: int,
    lost: bool,
) -> None:
    monkeypatch.setattr("experiments.train.resume._SAVE_SECONDS", 0.0)
    config = make_config(optimizer="adam", batch_size=7)
    whole = open_sweep(config, tmp_path / "whole")
    train_sweep(config, whole)
    killed = open_sweep(config, tmp_path / "killed")
    written = 0

    def write_then_die(path: Path, *arguments: object) -> None:
        nonlocal written
        if written == kill_after:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half a file")
            raise KeyboardInterrupt
        write_checkpoint(path, *arguments)  # type: ignore[arg-type]
        written += 1

    with monkeypatch.context() as patch:
        patch.setattr("experiments.task.write_checkpoint", write_then_die)
        with pytest.raises(KeyboardInterrupt):
            train_sweep(config, killed)
    assert len(_content(killed)) == kill_after
    if lost:
        # A checkpoint before the saved state is gone: going on from there would not bring it back.
        (killed.run(Network(3, 0)) / checkpoint_name(0)).unlink()
    train_sweep(config, open_sweep(config, tmp_path / "killed"))
    _assert_same(whole, killed)
    assert list(killed.resume.iterdir()) == []
    # As text: NaN is equal to itself.
    assert repr(read_metrics(killed).to_pylist()) == repr(read_metrics(whole).to_pylist())
    assert list(killed.root.rglob("*.tmp")) == []


def test_lost_checkpoints_are_trained_again_and_no_others_written(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    config = make_config()
    folder = open_sweep(config, tmp_path / "a")
    train_sweep(config, folder)
    reference = open_sweep(config, tmp_path / "b")
    train_sweep(config, reference)
    lost = folder.run(Network(5, 0)) / checkpoint_name(6)
    lost.unlink()
    kept = folder.run(Network(5, 1)) / checkpoint_name(6)
    time = kept.stat().st_mtime_ns
    assert finished(folder, Network(5, 0)) is None
    assert train_sweep(config, folder).trained == 1
    assert kept.stat().st_mtime_ns == time
    _assert_same(reference, folder)


def test_groups_run_side_by_side_and_a_resumed_one_on_as_many_threads(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def remember(*arguments: Any) -> list[LogRow]:
        threads.append(torch.get_num_threads())
        return train_group(*arguments)

    monkeypatch.setattr("experiments.train.groups._GROUP_OVERHEAD", 0)
    monkeypatch.setattr("experiments.task.train_group", remember)
    config = make_config()
    folder = open_sweep(config, tmp_path / "a")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_sweep(config, folder)
        (folder.run(Network(8, 0)) / "done.json").unlink()
        train_sweep(config, folder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1, 1, 1]
    monkeypatch.undo()
    assert finished(folder, Network(8, 0)) is not None


def test_another_configuration_is_refused_and_force_starts_anew(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    config = make_config(lr=0.01)
    train_sweep(config, open_sweep(config, tmp_path))
    changed = make_config(lr=0.02, widths=[3])
    with pytest.raises(ConfigError, match=r"lr \(there 0.01, now 0.02\), widths .*--force"):
        open_sweep(changed, tmp_path)
    folder = open_sweep(changed, tmp_path, force=True)
    assert _content(folder) == {}
    assert train_sweep(changed, folder).trained == 2


def test_another_method_of_upper_bounds_scores_the_same_networks_beside(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    folder = open_sweep(make_config(), tmp_path)
    assert train_sweep(make_config(), folder).trained == 6
    before = _content(folder)
    assert not any("upper" in metadata for metadata, _ in before.values())
    tighter = make_config(upper="quadratic")
    second = open_sweep(tighter, tmp_path)
    assert train_sweep(tighter, second).skipped == 6
    assert (folder.scores.name, second.scores.name) == ("scores", "scores-quadratic")
    assert found_folder(folder.root) == second
    with pytest.raises(ConfigError, match=r"settings: lr \(there 0.01, now 0.5\)\. Train"):
        open_sweep(make_config(lr=0.5), tmp_path)
    assert found_folder(folder.root) == second
    # As settings were written before there was a choice.
    stored = json.loads(folder.settings.read_text())
    del stored["upper"]
    folder.settings.write_text(json.dumps(stored))
    assert found_folder(folder.root) == folder == open_sweep(make_config(), tmp_path)
    for store in (folder.scores, second.scores):
        store.mkdir()
    open_sweep(make_config(), tmp_path, force=True)
    assert not folder.scores.exists()
    assert not second.scores.exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, make_config: MakeConfig, force: bool
) -> None:
    precious = tmp_path / "test-small" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds no readable sweep\.json.*--out"):
        open_sweep(make_config(), tmp_path, force=force)
    assert precious.read_text() == "years of work"


def test_an_unwritable_folder_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LipfastError, match="cannot write the sweep"):
        open_sweep(make_config(), tmp_path / "file")


def test_a_diverged_run_is_recorded_and_not_trained_again(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Network(5, 1)

    def overflowing(config: SweepConfig, network: Network) -> dict[str, torch.Tensor]:
        state = initial_state(config, network)
        return {name: tensor * 1e30 for name, tensor in state.items()} if network == bad else state

    config = make_config(checkpoints=[0, 3, 6])
    folder = open_sweep(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.train.stacked.initial_state", overflowing)
        summary = train_sweep(config, folder)
    assert summary.diverged == (run_name(bad),)
    done = finished(folder, bad)
    assert done is not None
    assert done["status"] == "diverged"
    assert len(list(folder.run(bad).glob("*.safetensors"))) == len(done["checkpoints"]) < 3
    again = train_sweep(config, folder)
    assert (again.trained, again.diverged) == (0, summary.diverged)


def test_progress_lines_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.progress import progress_on_stderr  # noqa: PLC0415

    with progress_on_stderr(4.0, every=0.0) as advance:
        advance(1.0, "training")
        advance(1.0, "training")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(",")[0] for line in captured.err.splitlines()] == [
        "training: 25%",
        "training: 50%",
    ]


def test_logs_and_runs_are_read_back(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(log_points=4, path_length=True)
    folder = open_sweep(config, tmp_path)
    train_sweep(config, folder)
    table = read_metrics(folder)
    assert table.num_rows == 6 * len(config.logged_steps)
    assert table["step"].to_pylist()[: len(config.logged_steps)] == list(config.logged_steps)
    assert table["path_length"][-1].as_py() >= table["distance"][-1].as_py() > 0
    found = runs(folder)
    assert [(run.width, run.seed) for run in found] == [(w, s) for w in (3, 5, 8) for s in (0, 1)]
    assert {(run.status, run.stopped, run.last_step) for run in found} == {("ok", "steps", 6)}
    model = load_model(folder, found[-1])
    state = load_file(folder.run(Network(8, 1)) / checkpoint_name(6))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(StoreError, match="no checkpoint at step 4"):
        load_model(folder, found[0], 4)
    with pytest.raises(StoreError, match="run the study first"):
        runs(SweepFolder(tmp_path / "nothing"))
    next(folder.metrics.iterdir()).write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="a log is damaged"):
        read_metrics(folder)

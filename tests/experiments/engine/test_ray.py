"""The Ray engine: with a stand-in for Ray everywhere, with a real cluster in the long tests."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.checkpoints import checkpoint_name
from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.engine import ray as engine
from experiments.sweep import SweepFolder, TrainingSummary, open_sweep, read_metrics, train_sweeps
from experiments.train import Network
from lipfast.errors import ArchiveError, ArgumentError, LipfastError

MakeConfig = Callable[..., SweepConfig]


class RayError(Exception):
    pass


class FakeRay(types.ModuleType):
    """Runs tasks where their result is asked for; `lost(n)` says whether the n-th is lost."""

    def __init__(self, lost: Callable[[int], bool]) -> None:
        super().__init__("ray")
        self.lost = lost
        self.exceptions = types.SimpleNamespace(RayError=RayError)
        self.cancelled: list[Any] = []
        self.done = 0

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": "here", "NodeManagerHostname": "here"}]

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: "here")

    def remote(self, **options: int) -> Callable[[Callable[..., Any]], Any]:
        assert options == {"num_cpus": 1, "max_retries": 3}
        return lambda function: types.SimpleNamespace(
            remote=lambda *arguments: lambda: function(*arguments)
        )

    def wait(self, waiting: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return waiting[-num_returns:], waiting[:-num_returns]

    def get(self, reference: Callable[[], Any]) -> Any:
        self.done += 1
        if self.lost(self.done):
            raise RayError("the worker died\nby a signal")
        return reference()

    def cancel(self, reference: Any, *, force: bool) -> None:
        assert force
        self.cancelled.append(reference)


@pytest.fixture
def fake(
    monkeypatch: pytest.MonkeyPatch, small_data: ClassificationData
) -> Iterator[Callable[..., FakeRay]]:
    # Generating MNIST1D takes seconds; its own test does it.
    monkeypatch.setattr("experiments.task.load_sweep_data", lambda config: small_data)

    def install(lost: Callable[[int], bool] = lambda number: False) -> FakeRay:
        ray = FakeRay(lost)
        monkeypatch.setattr(engine, "import_ray", lambda: ray)
        return ray

    threads = torch.get_num_threads()
    yield install
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def a_group_for_each_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.train.groups._GROUP_OVERHEAD", 0)


def _config(make_config: MakeConfig, **settings: Any) -> SweepConfig:
    basic = {"widths": [3, 5, 200], "seeds": [0, 1], "steps": 6, "batch_size": 8}
    return make_config(**{**basic, "log_points": 3, **settings})


def _trained(config: SweepConfig, out: Path, name: str) -> tuple[SweepFolder, TrainingSummary]:
    folder = open_sweep(config, out)
    return folder, train_sweeps([(config, folder)], name)


def _assert_same(ours: SweepFolder, expected: SweepFolder) -> None:
    names = sorted(p.relative_to(ours.checkpoints) for p in ours.checkpoints.rglob("*.safetensors"))
    there = expected.checkpoints.rglob("*.safetensors")
    assert names == sorted(p.relative_to(expected.checkpoints) for p in there)
    assert names
    for name in names:
        mine, theirs = (load_file(f.checkpoints / name) for f in (ours, expected))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    mine, theirs = (
        read_metrics(f).sort_by([("run", "ascending"), ("step", "ascending")])
        for f in (ours, expected)
    )
    assert mine.drop_columns("path_length").equals(theirs.drop_columns("path_length"))


def test_the_runs_are_those_of_the_local_engine(
    fake: Callable[..., FakeRay], make_config: MakeConfig, tmp_path: Path
) -> None:
    ray = fake()
    config = _config(make_config)
    ours, summary = _trained(config, tmp_path / "ray", "ray")
    assert (summary.trained, summary.skipped, ray.done) == (6, 0, 3)
    expected, _ = _trained(config, tmp_path / "local", "local")
    _assert_same(ours, expected)
    assert _trained(config, tmp_path / "ray", "ray")[1].skipped == 6
    assert ray.done == 3


def test_what_is_lost_again_and_again_is_an_error_and_the_rest_is_kept(
    fake: Callable[..., FakeRay], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = _config(make_config, widths=[3, 200, 2000])
    ray = fake(lambda number: number == 2)
    with pytest.raises(LipfastError, match=r"failed on the Ray cluster: by a signal. What is comp"):
        _trained(config, tmp_path, "ray")
    assert len(ray.cancelled) == 1
    fake()
    _, summary = _trained(config, tmp_path, "ray")
    assert (summary.trained, summary.skipped) == (4, 2)


def test_errors_of_a_worker_are_the_users(
    fake: Callable[..., FakeRay], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = _config(make_config)
    fake()
    folder = open_sweep(config, tmp_path)
    folder.data.write_bytes(b"damaged")
    with pytest.raises(LipfastError, match=r"data\.safetensors"):
        train_sweeps([(config, folder)], "ray")


def test_a_folder_that_another_machine_does_not_see(
    fake: Callable[..., FakeRay],
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake()
    monkeypatch.setattr(engine, "unseen", lambda ray, paths: [("node7", 0)])
    with pytest.raises(ArchiveError, match=r"machine node7 of the Ray cluster cannot see '.*--out"):
        _trained(_config(make_config), tmp_path, "ray")


def test_an_unknown_engine_and_a_missing_package(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(make_config)
    with pytest.raises(ArgumentError, match="engine 'spark': expected local or ray"):
        _trained(config, tmp_path, "spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArgumentError, match=r"pip install 'lipfast\[ray\]'"):
        _trained(config, tmp_path, "ray")


def test_tasks_survive_pickling(make_config: MakeConfig, tmp_path: Path) -> None:
    config = _config(make_config)
    task = engine.Task(config, SweepFolder(tmp_path), 0, ())
    function, (copy,) = pickle.loads(pickle.dumps((engine._train_here, (task,))))
    assert function is engine._train_here
    assert copy == task


# A real cluster of two workers on this machine; starting it takes longer than the rest together.


@pytest.fixture
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'lipfast[ray]'")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=2, **options)
    yield ray
    ray.shutdown()


def _is_ours(process: int) -> bool:
    """Whether a process descends from this one: another cluster may run on the machine."""
    while process not in {0, os.getpid()}:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        process = int(status.rpartition(")")[2].split()[1])
    return process != 0


def _training_workers() -> list[int]:
    """Processes that run a task of our cluster: Ray calls them by the function."""
    found = []
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            command = (path / "cmdline").read_bytes() if path.name.isdecimal() else b""
            if b"ray::call_from" in command and _is_ours(int(path.name)):
                found.append(int(path.name))
    return found


@pytest.mark.long
def test_a_worker_is_killed_in_the_middle(
    cluster: Any, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(
        make_config, widths=[4, 600], steps=3000, checkpoints=[0, 10, 100, 3000], train_size=400
    )
    folder = open_sweep(config, tmp_path / "ray")
    victims: list[int] = []

    early = folder.run(Network(600, 0)) / checkpoint_name(100)

    def wait(waiting: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        done: list[Any] = []
        while not done and not victims:
            done, rest = cluster.wait(waiting, num_returns=num_returns, timeout=0.02)
            if early.exists():
                # All of them: which one trains the wide networks, the machine's timing decides.
                victims.extend(_training_workers())
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
        return (done, rest) if done else cluster.wait(waiting, num_returns=num_returns)

    used = ("is_initialized", "remote", "get", "cancel", "nodes", "get_runtime_context")
    shim = {name: getattr(cluster, name) for name in (*used, "exceptions")}
    monkeypatch.setattr(engine, "import_ray", lambda: types.SimpleNamespace(**shim, wait=wait))
    summary = train_sweeps([(config, folder)], "ray")
    assert victims
    assert summary.trained == 4
    expected, _ = _trained(config, tmp_path / "local", "local")
    _assert_same(folder, expected)


@pytest.mark.long
def test_the_command_line_on_a_cluster_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'lipfast[ray]'")
    command = [sys.executable, "-m", "experiments", "run", "double-descent", "--scale", "tiny"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # no cluster that is there already
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--engine", "ray"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "6 runs trained, 0 complete already" in done.stdout
    assert "peaks aligned" in done.stdout

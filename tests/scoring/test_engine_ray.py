"""The Ray engine: with a stand-in for Ray everywhere, with a real cluster in the long tests."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lipfast.errors import ArchiveError, ArgumentError
from lipfast.scoring import Progress, read_scores, score
from lipfast.scoring.data import load_data
from lipfast.scoring.engine import ray as engine
from lipfast.scoring.options import Options
from lipfast.scoring.recipe import Recipe
from lipfast.scoring.where import Where
from tests.support.pretended_device import pretended_device
from tests.support.toy_archive import write_toy


class ActorDied(Exception):  # noqa: N818 (as Ray names it)
    pass


class FakeRay(types.ModuleType):
    """Runs actors at once, in this process; `dies(files)` says when one is lost instead.

    Attributes:
        resources: of the cluster.
        taken: by others.
        asked: what each worker asked for.
    """

    def __init__(self, dies: Callable[[list[str]], bool]) -> None:
        super().__init__("ray")
        self.dies = dies
        self.exceptions = types.SimpleNamespace(RayActorError=ActorDied)
        self.made, self.killed, self.tried = 0, 0, 0
        self.resources, self.taken = {"CPU": 2.0}, Counter[str]()
        self.asked: list[dict[str, float]] = []

    def is_initialized(self) -> bool:
        return True

    def put(self, value: Any) -> Any:
        return value

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def available_resources(self) -> dict[str, float]:
        return {name: value - self.taken[name] for name, value in self.resources.items()}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": "here", "NodeManagerHostname": "here"}]

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: "here")

    def remote(self, **resources: float) -> Callable[[type], Any]:
        self.asked.append(resources)
        return lambda kind: types.SimpleNamespace(remote=lambda *a, **k: self.make(kind, a, k))

    def make(self, kind: type, args: tuple, keywords: dict) -> Any:
        self.made += 1
        actor = kind(*args, **keywords)

        def call(files: list) -> Callable[[], Any]:
            def result() -> Any:
                self.tried += 1
                if self.dies([Path(file.path).stem for file in files]):
                    raise ActorDied("the actor died")
                return actor.score(files)

            return result

        return types.SimpleNamespace(score=types.SimpleNamespace(remote=call))

    def wait(self, waiting: list, num_returns: int) -> tuple[list, list]:
        return waiting[-num_returns:], waiting[:-num_returns]

    def get(self, reference: Callable[[], Any]) -> Any:
        return reference()

    def kill(self, worker: Any) -> None:
        self.killed += 1


@pytest.fixture
def fake(monkeypatch) -> Callable[..., FakeRay]:
    def install(dies: Callable[[list[str]], bool] = lambda names: False) -> FakeRay:
        ray = FakeRay(dies)
        monkeypatch.setattr(engine, "import_ray", lambda: ray)
        monkeypatch.setattr("torch.set_num_threads", lambda count: None)
        return ray

    return install


@pytest.fixture
def arguments(toy_models, samples, tmp_path) -> dict:
    return {"arch": toy_models, "data": samples, "out": tmp_path / "s", "engine": "ray"}


@pytest.fixture
def recipe(toy_models, samples) -> Recipe:
    return Recipe(toy_models, None, load_data(samples), Options())


def test_a_worker_with_another_lipfast_is_refused(fake, arguments, archive, monkeypatch):
    fake()
    make = engine.Worker.__init__

    def older(self, *given: Any, version: str, **options: Any) -> None:
        make(self, *given, version=f"{version}.older", **options)

    monkeypatch.setattr(engine.Worker, "__init__", older)
    with pytest.raises(ArgumentError, match=r"Ray cluster has lipfast .*install the same on all"):
        score(archive, **arguments)


def test_workers_on_cuda_have_a_gpu_each(fake, arguments, archive):
    ray = fake()
    ray.resources = {"CPU": 8.0, "GPU": 2.0}
    with pretended_device():
        summary = score(archive, **arguments, device="cuda")
    assert (summary.scored, summary.failed, summary.workers) == (12, 0, 2)
    assert "device: cuda, one GPU for each worker" in str(summary)
    assert ray.asked == [{"num_cpus": 1, "num_gpus": 1}] * 2


CPUS, BOTH, SHORT = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((BOTH, "cuda", 2), (2, "cuda")),
        ((BOTH, "cuda", None), (2, "cuda")),
        ((SHORT, "cuda", None), (1, "cuda")),
        ((BOTH, "auto", None), (2, "cuda")),
        ((BOTH, "cpu", None), (8, "cpu")),
        ((CPUS, "auto", 5), (5, "cpu")),
    ],
)
def test_workers_are_counted_by_what_they_compute_on(fake, recipe, asked, expected):
    fake().resources, device, workers = asked
    with pretended_device():
        found = engine.RayEngine(replace(recipe, device=device), 1 << 20, Where(), workers)
    assert (found.workers, found.device.partition(",")[0]) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            (BOTH, "cuda", 3),
            "3 workers of one GPU each: the Ray cluster has 2 GPUs, 2 of them",
        ),
        (
            (SHORT, "cuda", 2),
            "2 workers of one CPU each: the Ray cluster has 1 CPU, 1 of them",
        ),
        ((CPUS, "cpu", 9), "9 workers of one CPU each: the Ray cluster has 8 CPUs, 8 of them"),
        ((CPUS, "cuda", None), "the Ray cluster has no GPU"),
        (({}, "cpu", None), "1 worker of one CPU each: the Ray cluster has 0 CPUs"),
        ((BOTH, "cuda:1", None), "every worker has a GPU of its own, say cuda"),
        ((CPUS, "mps", None), "device mps with engine 'ray'"),
    ],
)
def test_what_a_cluster_has_no_room_for_is_refused_at_once(
    fake, recipe, monkeypatch, asked, message
):
    fake().resources, device, workers = asked
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: pytest.fail("waits"))
    with pytest.raises(ArgumentError, match=message):
        engine.RayEngine(replace(recipe, device=device), 1 << 20, Where(), workers)


def test_what_earlier_workers_had_is_waited_for_and_what_others_have_is_not(
    fake, recipe, monkeypatch
):
    ray = fake()
    ray.taken["CPU"] = 2
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: ray.taken.clear())
    assert engine.RayEngine(recipe, 1 << 20, Where(), 2).workers == 2
    ray.taken["CPU"] = 1
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(engine, "_GIVEN_BACK", 0.0)
    with pytest.raises(ArgumentError, match="has 2 CPUs, 1 of them free"):
        engine.RayEngine(recipe, 1 << 20, Where(), 2)
    assert engine.RayEngine(recipe, 1 << 20, Where(), None).workers == 1


def test_a_worker_without_the_device_says_which_machine_it_is(fake, arguments, archive):
    fake().resources = {"CPU": 2.0, "GPU": 1.0}
    with pytest.raises(ArgumentError, match=r"the machine .* of the Ray cluster: device cuda: no"):
        score(archive, **arguments, device="cuda")


def test_the_scores_are_those_of_the_local_engine(fake, arguments, archive, tmp_path):
    ray = fake()
    seen: list[Progress] = []
    summary = score(archive, **arguments, progress=seen.append)
    assert (summary.scored, summary.failed, summary.plans) == (12, 0, 2)
    seconds = summary.seconds
    assert {"upper", "lower", "read", "write"} <= set(seconds)
    assert 0 < seconds["ops"] < seconds["upper"] + seconds["lower"]
    share = f"{seconds['ops'] / seconds['total'] / summary.workers:.0%} of the time inside"
    assert summary.workers == 2
    assert share in str(summary)
    assert seen[-1].done == 12
    assert (ray.made, ray.killed) == (2, 2)
    assert score(archive, **arguments).skipped == 12
    score(archive, **{**arguments, "engine": "local", "out": tmp_path / "local"})
    ours, local = read_scores(tmp_path / "s"), read_scores(tmp_path / "local")
    for name in ("uri", "status", "fingerprint", "run", "step"):
        assert ours[name].equals(local[name])
    assert ours["upper"].to_pylist() == pytest.approx(local["upper"].to_pylist(), rel=1e-6)


def test_the_piece_of_a_lost_worker_is_done_again(fake, arguments, archive):
    losses = []

    def once(names: list[str]) -> bool:
        losses.append(names)
        return len(losses) == 2

    ray = fake(once)
    assert score(archive, **arguments).scored == 12
    assert ray.made == 3
    table = read_scores(arguments["out"])
    assert table.num_rows == len(set(table["uri"].to_pylist())) == 12


def test_what_kills_every_worker_becomes_a_row(fake, arguments, archive):
    write_toy(archive / "w4s0" / "poison.safetensors", 4)
    ray = fake(lambda names: "poison" in names)
    summary = score(archive, **arguments)
    assert (summary.scored, summary.failed) == (12, 1)
    assert summary.reasons == {"WorkerLostError": 1}
    assert "every worker that tried it was lost" in next(iter(summary.examples.values()))
    assert ray.tried < 40
    assert read_scores(arguments["out"]).num_rows == 13


def test_bad_checkpoints_conditions_and_limits(fake, arguments, archive):
    fake()
    (archive / "w4s0" / "rubbish.pt").write_bytes(b"rubbish")
    summary = score(archive, **arguments, where="step = 10")
    assert (summary.scored, summary.failed, summary.left_out) == (4, 1, 8)
    summary = score(archive, **arguments, limit=3)
    assert (summary.scored, summary.skipped, summary.failed_before) == (3, 4, 1)


def test_an_architecture_that_cannot_be_made_is_an_error(fake, arguments, archive):
    fake()
    broken = {**arguments, "arch": "lipfast_toy_models:broken"}
    with pytest.raises(ArgumentError, match="raised RuntimeError: no such model"):
        score(archive, **broken)


def test_files_that_no_worker_can_see(fake, arguments):
    fake()
    memory = fsspec.filesystem("memory")
    memory.pipe("/lipfast-ray/a.pt", b"1")
    try:
        with pytest.raises(ArchiveError, match="memory of this process, where workers cannot see"):
            score("memory://lipfast-ray", **arguments)
    finally:
        memory.rm("/lipfast-ray", recursive=True)


def test_files_that_another_machine_does_not_see(fake, arguments, archive, monkeypatch):
    ray = fake()
    other = {"Alive": True, "NodeID": "there", "NodeManagerHostname": "node7"}
    monkeypatch.setattr(ray, "nodes", lambda: [*FakeRay.nodes(ray), other])
    strategies = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)
    for name in ("ray", "ray.util", "ray.util.scheduling_strategies"):
        monkeypatch.setitem(sys.modules, name, strategies)

    def remote(**resources: float) -> Callable[[Any], Any]:
        answer = types.SimpleNamespace(remote=lambda paths: [None] * len(paths))
        return lambda function: types.SimpleNamespace(options=lambda **options: answer)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda references: references)
    with pytest.raises(ArchiveError, match=r"machine node7 of the Ray cluster cannot see 'file://"):
        score(archive, **arguments)


def test_without_ray_the_error_names_the_extra(arguments, archive, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArgumentError, match=r"pip install 'lipfast\[ray\]'"):
        score(archive, **arguments)


# A real cluster of two workers on this machine. Starting it and compiling in each worker takes
# longer than everything else together, therefore long.


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'lipfast[ray]'")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=2, **options)
    yield ray
    ray.shutdown()


def large(root: Path) -> Path:
    for run in range(8):
        for step in range(25):
            path = root / f"run{run}" / f"step{step}.safetensors"
            write_toy(path, 4 + 2 * (run % 2), seed=100 * run + step, step=step)
    return root


@pytest.mark.long
def test_a_worker_is_killed_in_the_middle(cluster, arguments, tmp_path, monkeypatch):
    archive = large(tmp_path / "large")
    monkeypatch.setattr(engine, "PIECE_FILES", 25)
    victims: list[int] = []

    def kill(at: Progress) -> None:
        if not victims and 0 < at.done < 150:
            victims.extend(workers_of(os.getpid()))
            os.kill(busiest(victims), signal.SIGKILL)

    summary = score(archive, **arguments, workers=2, progress=kill)
    assert victims
    assert (summary.scored, summary.failed) == (200, 0)
    table = read_scores(arguments["out"])
    assert table.num_rows == len(set(table["uri"].to_pylist())) == 200
    assert set(table["status"].to_pylist()) == {"ok"}
    score(archive, **{**arguments, "engine": "local", "out": tmp_path / "local"})
    expected = read_scores(tmp_path / "local")
    assert table["uri"].equals(expected["uri"])
    assert table["upper"].to_pylist() == pytest.approx(expected["upper"].to_pylist(), rel=1e-6)


def status(pid: int) -> tuple[str, int, int]:
    """Name, parent and processor time of a process."""
    text = Path(f"/proc/{pid}/stat").read_text()
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return name, int(fields[1]), int(fields[11]) + int(fields[12])


def processes() -> dict[int, tuple[str, int, int]]:
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with suppress(OSError):
                found[int(path.name)] = status(int(path.name))
    return found


def workers_of(driver: int) -> list[int]:
    """Workers of the cluster that this process started: children of its raylet."""
    table = processes()
    raylets = {pid for pid, (name, up, _) in table.items() if name == "raylet" and up == driver}
    named = {pid for pid, (name, up, _) in table.items() if up in raylets and "Worker" in name}
    return sorted(named)


def busiest(pids: list[int]) -> int:
    """The worker that has used most of the processor is scoring; idle ones wait."""
    table = processes()
    return max(pids, key=lambda pid: table[pid][2] if pid in table else -1)

"""Whole checkpoints: read, upper bound, lower bound, write.

Measured on the demo's archive when it is there (without `make demo` before it, an archive of the
same shapes with random weights stands in, and the case says so), and on 5,000 checkpoints of real
runs of a 40-256-256-10 perceptron, 1,000 samples, which are trained once (two minutes, 1.6 GB,
`runs/bench-archive`; `LIPFAST_BENCH_CHECKPOINTS` asks for another number). Every tenth of them is
scored in turn with the peers, all of them once. Also: memory, Ray workers, and how long a store of
100,000 rows takes to open and resume from.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lipfast
from bench import archive as real
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure
from experiments.data import mnist1d
from experiments.models import fcn
from lipfast.checkpoints import CheckpointFile, find_checkpoints
from lipfast.scoring import Summary
from lipfast.scoring.data import load_data
from lipfast.scoring.done import completed
from lipfast.scoring.engine.ray import RayEngine
from lipfast.scoring.options import Options
from lipfast.scoring.order import every
from lipfast.scoring.pipeline import MEMORY
from lipfast.scoring.recipe import Recipe
from lipfast.scoring.scorer import Scorer
from lipfast.scoring.scores import read_part
from lipfast.scoring.store import StoreWriter, parts, write_part
from lipfast.scoring.where import Where

DEMO = Path("runs/double-descent-demo")
WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SAMPLES = 400

REAL = Path("runs/bench-archive")
CHECKPOINTS = 5000
RUNS = 20
PART = 10  # every so many checkpoints of a run are scored in turn with the peers
PEER_CHECKPOINTS = 6


class Archive(NamedTuple):
    case: str
    folder: Path
    data: Path
    one_per_width: list[tuple[nn.Module, Path]]
    x: Tensor
    checkpoints: int


def random_archive(folder: Path, per_width: int = 36) -> None:
    """Write an archive of the demo's shapes with random weights."""
    generator = torch.Generator().manual_seed(0)
    save_file(
        {"x_train": torch.randn(SAMPLES, 40, generator=generator)}, folder / "data.safetensors"
    )
    for width, step in itertools.product(WIDTHS, range(per_width)):
        run = folder / "checkpoints" / f"width-{width}"
        run.mkdir(parents=True, exist_ok=True)
        state_dict = {
            name: torch.randn(value.shape, generator=generator) / max(value.shape) ** 0.5
            for name, value in fcn(width).state_dict().items()
        }
        metadata = {"run": run.name, "step": str(step), "width": str(width)}
        save_file(state_dict, run / f"step_{step:06d}.safetensors", metadata)


@pytest.fixture(scope="module", autouse=True)
def scratch() -> Iterator[None]:
    yield
    if real_runs.cache_info().currsize and real_runs().folder != REAL:
        shutil.rmtree(real_runs().folder)
    real_runs.cache_clear()
    if large_store.cache_info().currsize:
        shutil.rmtree(large_store()[0])
    large_store.cache_clear()
    if archive.cache_info().currsize and archive().folder != DEMO:
        shutil.rmtree(archive().folder)
    archive.cache_clear()


@cache
def archive() -> Archive:
    folder, case = DEMO, "scoring the demo's archive"
    if not (folder / "checkpoints").exists():
        folder, case = Path(tempfile.mkdtemp()), "scoring the demo's shapes, random weights"
        random_archive(folder)
    checkpoints = sorted((folder / "checkpoints").rglob("*.safetensors"))
    last: dict[int, Path] = {}
    for path in checkpoints:
        with safe_open(path, "pt") as file:
            last[int(file.metadata()["width"])] = path
    models = [
        (baselines.without_parameter_gradients(fcn(width)), path)
        for width, path in sorted(last.items())
    ]
    data = folder / "data.safetensors"
    return Archive(case, folder, data, models, load_file(data)["x_train"], len(checkpoints))


def score_all() -> None:
    found = archive()
    with tempfile.TemporaryDirectory() as out:
        summary = lipfast.score(
            str(found.folder / "checkpoints"),
            arch="experiments.models:fcn",
            data=f"{found.data}:x_train",
            out=out,
        )
    assert summary.scored == found.checkpoints, summary


def archive_implementations() -> Implementations:
    found = archive()
    few = found.one_per_width
    work: Implementations = {"lipfast": (score_all, found.checkpoints)}
    for name in baselines.TUNED_JACOBIAN_NORMS:
        work[f"tuned ({name})"] = (
            lambda name=name: [
                baselines.tuned_score(model, path, found.x, name) for model, path in few
            ],  # type: ignore[misc]
            len(few),
        )
    work["naive"] = (
        lambda: [baselines.naive_score(model, path, found.x) for model, path in few],
        len(few),
    )
    return work


@in_turn("lipfast", *(f"tuned ({name})" for name in baselines.TUNED_JACOBIAN_NORMS), "naive")
def bench_archive(benchmark: Benchmark, turn: int, implementation: str) -> None:
    found = archive()
    case = f"{found.case} ({found.checkpoints} checkpoints, {len(found.x)} samples)"
    measure(benchmark, case, implementation, archive_implementations()[implementation])


# Real runs


@cache
def real_runs() -> Archive:
    count = int(os.environ.get("LIPFAST_BENCH_CHECKPOINTS", str(CHECKPOINTS)))
    folder = REAL if count == CHECKPOINTS else Path(tempfile.mkdtemp())
    data = folder / "data.safetensors"  # written last: without it the archive is incomplete
    if not data.exists():
        shutil.rmtree(folder, ignore_errors=True)
        real.train_archive(folder / "checkpoints", count - count % RUNS, RUNS)
        save_file({"x_train": mnist1d().x_test[:1000].contiguous()}, data)
    paths = sorted((folder / "checkpoints").rglob("*.safetensors"))
    model = baselines.without_parameter_gradients(fcn(real.WIDTH, real.DEPTH))
    few = [
        (model, path)
        for path in paths[:: max(1, len(paths) // PEER_CHECKPOINTS)][:PEER_CHECKPOINTS]
    ]
    case = "scoring real runs of 40-256-256-10"
    return Archive(case, folder, data, few, load_file(data)["x_train"], len(paths))


def score_real_runs(every_so_many: int) -> Summary:
    found = real_runs()
    with tempfile.TemporaryDirectory() as out:
        summary = lipfast.score(
            found.folder / "checkpoints",
            arch=real.ARCHITECTURE,
            data=found.x,
            out=out,
            every=every_so_many,
        )
    assert summary.scored == -(-found.checkpoints // every_so_many), summary
    return summary


def overlap(summary: Summary) -> str:
    """Say how much of the time was spent inside the two native ops, and what was waited for."""
    seconds = summary.seconds
    ops = seconds["ops"] / seconds["total"]
    bounds = (seconds["upper"] + seconds["lower"]) / seconds["total"]
    return (
        f"{summary.rate:.0f} checkpoints/s; of {seconds['total']:.1f} s, {ops:.1%} inside "
        f"spectral_norms and chain_jacobian_norms, {bounds:.1%} with all else that the bounds "
        f"take; reading was waited for {seconds['wait']:.2f} s, writing took "
        f"{seconds['write']:.2f} s of a thread of its own"
    )


@in_turn(
    "lipfast", *(f"tuned ({name})" for name in baselines.TUNED_JACOBIAN_NORMS), "naive", turns=3
)
def bench_real_runs(benchmark: Benchmark, turn: int, implementation: str) -> None:
    """Every tenth checkpoint; of these, tuned loops on six, the naive one on another each turn."""
    found = real_runs()
    few, x, summaries = found.one_per_width, found.x, []
    work: Implementations = {
        "lipfast": (lambda: summaries.append(score_real_runs(PART)), found.checkpoints // PART),
        "naive": (lambda: baselines.naive_score(*few[turn], x), 1),
    }
    for name in baselines.TUNED_JACOBIAN_NORMS:
        work[f"tuned ({name})"] = (
            lambda name=name: [baselines.tuned_score(*one, x, name) for one in few],  # type: ignore[misc]
            len(few),
        )
    case = f"{found.case} ({found.checkpoints // PART} checkpoints, {len(x)} samples)"
    warmup = turn == 0 and implementation != "naive"
    measure(benchmark, case, implementation, work[implementation], warmup=warmup)
    if summaries:
        benchmark.extra_info["note"] = overlap(summaries[-1])


def bench_all_real_runs(benchmark: Benchmark) -> None:
    found, summaries = real_runs(), []
    work = (lambda: summaries.append(score_real_runs(1))), found.checkpoints
    case = f"{found.case} (all {found.checkpoints}, once)"
    measure(benchmark, case, "lipfast", work, warmup=False)
    benchmark.extra_info["note"] = overlap(summaries[-1])


# Memory


PEAK = """
import resource, sys, torch
from lipfast.scoring import score
torch.set_num_threads(2)
archive, data, out, every = sys.argv[1:]
score(archive, arch="experiments.models:fcn", data=data, out=out, every=int(every))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(every_so_many: int) -> float:
    """MiB that scoring takes at most, in a process of its own."""
    found = real_runs()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", PEAK, str(found.folder / "checkpoints")]
        command += [f"{found.data}:x_train", out, str(every_so_many)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return int(done.stdout) / 1024


def bench_memory(benchmark: Benchmark) -> None:
    count, peaks = real_runs().checkpoints, []
    work = (lambda: peaks.extend([peak(PART), peak(1)])), count + count // PART
    case = f"memory of {count // PART} and of {count} checkpoints"
    measure(benchmark, case, "lipfast", work, warmup=False)
    benchmark.extra_info["note"] = (
        f"at most {peaks[0]:.0f} and {peaks[1]:.0f} MiB, a factor of {peaks[1] / peaks[0]:.3f}"
    )


# Workers


@cache
def ray_engine(workers: int) -> RayEngine:
    """Workers that have imported and traced all they need: what a long run spends no time on."""
    found = real_runs()
    recipe = Recipe(real.ARCHITECTURE, None, load_data(found.x), Options())
    engine = RayEngine(recipe, MEMORY, Where(), workers)
    few = find_checkpoints(found.folder / "checkpoints")[:: found.checkpoints // 8]
    assert sum(len(rows) for rows in engine.run(few)) == len(few)
    return engine


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'lipfast[ray]'")
    # The workers of both engines stay; one engine computes at a time.
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray_engine.cache_clear()
    ray.shutdown()


@in_turn("lipfast", "one worker", turns=4)
def bench_two_ray_workers(
    benchmark: Benchmark, cluster: None, turn: int, implementation: str
) -> None:
    found = real_runs()
    files = every(find_checkpoints(found.folder / "checkpoints"), PART)
    engine = ray_engine(1 if implementation == "one worker" else 2)
    work = (lambda: sum(len(rows) for rows in engine.run(files))), len(files)
    case = f"two Ray workers, one core each ({len(files)} checkpoints)"
    measure(benchmark, case, implementation, work, warmup=False)


# Large stores


ROWS = 100_000


@cache
def large_store() -> tuple[Path, list[CheckpointFile]]:
    """A store of 100,000 rows as a real run leaves it, and the files that it knows."""
    folder = Path(tempfile.mkdtemp())
    write_toy_run(folder / "one")
    lipfast.score(folder / "one", arch=fcn, data=torch.ones(2, 40), out=folder / "scores")
    (part,) = parts(folder / "scores")
    table = read_part(part)
    uris = [f"file:///archive/run-{i // 1000}/step_{i % 1000:06d}.safetensors" for i in range(ROWS)]
    for start in range(0, ROWS, 5000):
        rows = table.take(pa.array([0] * 5000, pa.int64()))
        names = pa.array(uris[start : start + 5000], pa.string())
        rows = rows.set_column(0, rows.schema.field(0), names)
        write_part(folder / "scores", rows)
    part.unlink()
    size, mtime = table["size"][0].as_py(), table["mtime"][0].as_py()
    files = [CheckpointFile(uri, uri[7:], size, mtime, "run") for uri in uris]
    return folder, files


def write_toy_run(folder: Path) -> None:
    folder.mkdir()
    metadata = {"run": "r", "step": "1", "width": "8", "lr": "0.1", "loss": "ce", "seed": "0"}
    save_file(fcn(8).state_dict(), folder / "a.safetensors", metadata)


def resume(folder: Path, files: list[CheckpointFile], scorer: Scorer) -> None:
    done = completed(folder / "scores")
    StoreWriter(folder / "scores")
    assert all(done.is_scored(file, scorer.fingerprint) for file in files)


@pytest.mark.parametrize("what", ["resume", "read_scores"])
def bench_store_of_100_000_rows(benchmark: Benchmark, what: str) -> None:
    folder, files = large_store()
    scorer = Recipe(fcn, None, load_data(torch.ones(2, 40)), Options()).scorer()
    scorer.fingerprint({"width": 8}, 1 << 20)  # tracing is part of scoring
    calls = {
        "resume": lambda: resume(folder, files, scorer),
        "read_scores": lambda: lipfast.read_scores(folder / "scores"),
    }
    measure(benchmark, f"a store of 100,000 rows: {what}", "lipfast", (calls[what], 1))

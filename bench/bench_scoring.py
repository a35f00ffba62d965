"""Whole checkpoints: read, upper bound, lower bound, write.

Measured on the demo's archive when it is there (without `make demo` before it, an archive of the
same shapes with random weights stands in, and the case says so), and on real runs of one
40-256-256-10 perceptron, 1,000 samples. `LIPFAST_BENCH_CHECKPOINTS` says how many of these are
trained first (500; the goal is 5,000); the peers are timed on six. Also: how long a store of
100,000 rows takes to open and resume from.
"""

from __future__ import annotations

import itertools
import os
import shutil
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
from lipfast.checkpoints import CheckpointFile
from lipfast.scoring.data import load_data
from lipfast.scoring.done import completed
from lipfast.scoring.scorer import Options, Recipe, Scorer
from lipfast.scoring.scores import read_part
from lipfast.scoring.store import parts, write_part

DEMO = Path("runs/double-descent-demo")
WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SAMPLES = 400
PEERS = 6


class Archive(NamedTuple):
    case: str
    folder: Path
    data: Path
    one_per_width: list[tuple[nn.Module, Path]]
    x: Tensor
    checkpoints: int


def random_archive(folder: Path, per_width: int = 36) -> None:
    """The demo's shapes, random weights."""
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
    if real_runs.cache_info().currsize:
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


def implementations() -> Implementations:
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
    measure(benchmark, case, implementation, implementations()[implementation])


# Real runs


@cache
def real_runs() -> Archive:
    count = int(os.environ.get("LIPFAST_BENCH_CHECKPOINTS", "500"))
    runs = max(1, count // 100)
    folder = Path(tempfile.mkdtemp())
    real.train_archive(folder / "checkpoints", count - count % runs, runs)
    x = mnist1d().x_test[:1000].contiguous()
    save_file({"x_train": x}, folder / "data.safetensors")
    paths = sorted((folder / "checkpoints").rglob("*.safetensors"))
    model = baselines.without_parameter_gradients(fcn(real.WIDTH, real.DEPTH))
    few = [(model, path) for path in paths[:: max(1, len(paths) // PEERS)][:PEERS]]
    return Archive(
        "scoring real runs of 40-256-256-10",
        folder,
        folder / "data.safetensors",
        few,
        x,
        len(paths),
    )


def score_real_runs(shares: list[float]) -> None:
    found = real_runs()
    with tempfile.TemporaryDirectory() as out:
        summary = lipfast.score(
            str(found.folder / "checkpoints"), arch=real.ARCHITECTURE, data=found.x, out=out
        )
    assert summary.scored == found.checkpoints, summary
    seconds = summary.seconds
    shares.append((seconds["upper"] + seconds["lower"]) / seconds["total"])


@in_turn(
    "lipfast",
    *(f"tuned ({name})" for name in baselines.TUNED_JACOBIAN_NORMS),
    "naive",
    turns=3,
    once=("lipfast", "naive"),
)
def bench_real_runs(benchmark: Benchmark, turn: int, implementation: str) -> None:
    found, shares = real_runs(), []  # type: ignore[var-annotated]
    few = found.one_per_width
    case = f"{found.case} ({found.checkpoints} checkpoints, {len(found.x)} samples)"
    if implementation == "lipfast":
        work = (lambda: score_real_runs(shares)), found.checkpoints
    elif implementation == "naive":
        work = (lambda: [baselines.naive_score(*one, found.x) for one in few[:2]]), 2  # type: ignore[assignment]
    else:
        name = implementation.removeprefix("tuned (").removesuffix(")")
        work = (lambda: [baselines.tuned_score(*one, found.x, name) for one in few]), len(few)  # type: ignore[assignment]
    measure(benchmark, case, implementation, work, warmup=implementation.startswith("tuned"))
    if shares:
        benchmark.extra_info["share"] = shares[-1]


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

"""Whole checkpoints: read, upper bound, lower bound, write.

Measured on the demo's archive when it is there. Without `make demo` before it, an archive of the
same shapes with random weights stands in (and the case says so).
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lipfast
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure
from experiments.models import fcn

DEMO = Path("runs/double-descent-demo")
WIDTHS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
SAMPLES = 400


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

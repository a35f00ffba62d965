"""What the host does for each checkpoint that a device scores, measured without a device.

The device is the pretended one of the tests, whose operations run on the CPU. Time inside calls of
torch, and what the pretence costs around each, is taken off that of the thread that scores, and
each call is put down with a little instead. What is left bounds the speed of a device from above,
however fast its kernels are: finding, grouping, checks, calls, rows. Reading, packing and writing
are done by other threads beside it and are counted apart.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import lipfast
from bench.turns import Benchmark, measure
from experiments.models import fcn
from lipfast.checkpoints import find_checkpoints
from lipfast.scoring.data import load_data
from lipfast.scoring.engine.local import LocalEngine
from lipfast.scoring.options import Options
from lipfast.scoring.recipe import Recipe
from lipfast.scoring.where import Where

pretence: Any = importlib.import_module("tests.support.pretended_device")  # of the tests: untyped

WIDTH, DEPTH = 256, 2
CHECKPOINTS, RUNS, SAMPLES = 1024, 16, 2


# The memory of a pretended device is the host's: as far as possible it is never given back.
_KEEPING_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# What Python asks of a tensor without a call of ATen: `__get__` is any attribute.
_ATTRIBUTES = {"__get__", "is_contiguous", "dim", "numel", "element_size", "size", "stride"}
# Seconds of the host that are put down for an attribute of a tensor, another call of torch, and a
# kernel that it starts: more than they take.
ATTRIBUTE, CALL, LAUNCH = 0.1e-6, 1e-6, 5e-6


class Stopwatch:
    """Processor time of this thread inside calls of torch, nested ones once.

    Attributes:
        seconds: inside.
        calls: how many, nested ones once.
        attributes: how many of them only ask for one of `_ATTRIBUTES`.
    """

    def __init__(self) -> None:
        self.seconds, self.calls, self.attributes, self._depth = 0.0, 0, 0, 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return call(*args, **kwargs)
            started, self._depth = time.thread_time(), 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth = 0
                self.calls += 1
                self.attributes += getattr(args[1], "__name__", "") in _ATTRIBUTES
                self.seconds += time.thread_time() - started

        return timed

    def overhead(self) -> float:
        """Seconds around a call of torch that are not in `seconds`: the pretence's and its own."""
        tensor, before = torch.ones(1), (self.seconds, self.calls)
        started = time.thread_time()
        for _ in range(20_000):
            tensor.dtype  # noqa: B018 (a call of torch as the pretence sees it)
        spent = time.thread_time() - started
        seconds, calls = self.seconds - before[0], self.calls - before[1]
        return (spent - seconds) / calls


def write_archive(folder: Path) -> None:
    """Checkpoints of a 40-256-256-10 perceptron, a few runs side by side."""
    generator = torch.Generator().manual_seed(0)
    state = fcn(WIDTH, DEPTH).state_dict()
    for run in range(RUNS):
        (folder / f"run-{run}").mkdir(parents=True)
        for step in range(CHECKPOINTS // RUNS):
            own = {
                name: torch.randn(value.shape, generator=generator) / max(value.shape) ** 0.5
                for name, value in state.items()
            }
            metadata = {"run": f"run-{run}", "step": step, "width": WIDTH, "depth": DEPTH}
            texts = {key: str(value) for key, value in metadata.items()}
            save_file(own, folder / f"run-{run}" / f"step_{step}.safetensors", texts)


def host_work(folder: Path) -> tuple[float, float]:
    """Microseconds per checkpoint: of the thread that scores, and of all others together."""
    watch = Stopwatch()
    x = torch.randn(SAMPLES, 40, generator=torch.Generator().manual_seed(0))
    moves = pretence._Moves
    with (
        contextlib.ExitStack() as stack,
        tempfile.TemporaryDirectory() as out,
        pretence.pretended_device() as counts,
        mock.patch.object(pretence, "_run", watch.around(pretence._run)),
        mock.patch.object(moves, "__torch_function__", watch.around(moves.__torch_function__)),
    ):
        # Tracing is done once per architecture, and is not of a checkpoint: the plans are kept.
        kept = Recipe("experiments.models:fcn", None, load_data(x), Options(), "cuda").scorer()
        few = find_checkpoints(folder / "run-0")
        assert sum(len(rows) for rows in LocalEngine(kept, 1 << 30, Where()).run(few)) == len(few)
        stack.enter_context(mock.patch.object(Recipe, "scorer", lambda *_, **__: kept))
        overhead = watch.overhead()
        gc.collect()
        gc.freeze()  # of Python's collector, passes over the objects of torch and of the pretence
        own, everyone = time.thread_time(), time.process_time()
        counts.clear()
        before = watch.seconds, watch.calls, watch.attributes
        summary = lipfast.score(
            folder,
            arch="experiments.models:fcn",
            data=x,
            out=f"{out}/all",
            memory=4 << 30,
            device="cuda",
        )
        own, everyone = time.thread_time() - own, time.process_time() - everyone
        after = watch.seconds, watch.calls, watch.attributes
        inside, calls, attributes = (b - a for a, b in zip(before, after, strict=True))
    assert summary.scored == CHECKPOINTS, summary
    work = own - inside - calls * overhead + counts.launches * LAUNCH
    work += attributes * ATTRIBUTE + (calls - attributes) * CALL
    return 1e6 * work / CHECKPOINTS, 1e6 * (everyone - own) / CHECKPOINTS


def measured(folder: Path) -> list[float]:
    """`host_work` in a process of its own."""
    command = [sys.executable, "-m", "bench.bench_scoring_host", str(folder)]
    environment = {**os.environ, **_KEEPING_MEMORY}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return [float(text) for text in done.stdout.split()[-2:]]


def bench_host_work(benchmark: Benchmark) -> None:
    found: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_archive(Path(folder))
        work = (lambda: found.append(measured(Path(folder)))), CHECKPOINTS
        case = "host work on a device (40-256-256-10)"
        measure(benchmark, case, "lipfast", work, warmup=False)
    scoring, others = found[-1]
    benchmark.extra_info["note"] = (
        f"{scoring:.0f} us per checkpoint of the thread that scores, beside {others:.0f} us of "
        "those that read, pack and write"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*host_work(Path(sys.argv[1])))

"""ResNet-18 on 3 x 224 x 224, every layer's norm certified at rtol 1e-2: cold, and warm-started.

The warm one follows a checkpoint that differs by 1e-3, relative, in every kernel and matrix. Times
are of the bound alone. The peak of the memory, tracing included, is that of a process of its own,
which prints its times too: ``python -m bench.bench_resnet``.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

import lipfast
from bench.resnet import resnet18
from bench.turns import Benchmark, Implementations, in_turn, measure

COLD, WARM = "lipfast, cold", "lipfast"
CASE = "ResNet-18, 3 x 224 x 224, certified at 1e-2"
CHANGE, RTOL = 1e-3, 1e-2


def changed_state(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Every kernel and matrix plus noise of a thousandth of its Frobenius norm."""
    result = {}
    for name, value in state.items():
        if value.dim() > 1:
            noise = torch.randn(value.shape, generator=generator)
            value = value + CHANGE * value.norm() / noise.norm() * noise  # noqa: PLW2901
        result[name] = value
    return result


def checkpoints() -> tuple[lipfast.Plan, dict[str, Tensor], dict[str, Tensor]]:
    model = resnet18().eval()
    plan = lipfast.compile(model, torch.zeros(2, 3, 224, 224))
    first = model.state_dict()
    return plan, first, changed_state(first, torch.Generator().manual_seed(1))


@cache
def prepared() -> tuple[lipfast.Plan, dict[str, Tensor], dict[str, Tensor], lipfast.Tracker]:
    """The plan, both checkpoints, and what a bound of the first one leaves to start from."""
    plan, first, second = checkpoints()
    tracker = plan.tracker(rtol=RTOL)
    tracker.upper(first)
    return plan, first, second, tracker


def all_certified(bound: lipfast.UpperBound) -> lipfast.UpperBound:
    assert bound.certified
    assert all(layer.certified for layer in bound.layers)
    return bound


@in_turn(WARM, COLD, turns=3, once={COLD})
def bench_resnet18(benchmark: Benchmark, turn: int, implementation: str) -> None:
    plan, first, second, tracker = prepared()
    work: Implementations = {
        WARM: (
            lambda: all_certified(plan.upper(second, rtol=RTOL, start=tracker.vectors)),
            1,
        ),
        COLD: (lambda: all_certified(plan.upper(first, rtol=RTOL)), 1),
    }
    measure(benchmark, CASE, implementation, work[implementation], warmup=False)
    if not turn and implementation == COLD:
        benchmark.extra_info["note"] = f"in a process of its own: {one_process()}"


def one_process() -> str:
    """Times and peak of the memory that a process of its own measures."""
    command = [sys.executable, "-m", "bench.bench_resnet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def print_times() -> None:
    """Trace, cold bound, warm bound; seconds, and the peak of the memory."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    times = [time.perf_counter()]
    plan, first, second = checkpoints()
    times.append(time.perf_counter())
    tracker = plan.tracker(rtol=RTOL)
    for state in (first, second):
        all_certified(tracker.upper(state))
        times.append(time.perf_counter())
    traced, cold, warm = (after - before for before, after in pairwise(times))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"traced in {traced:.1f} s, cold {cold:.1f} s, warm {warm:.2f} s ({cold / warm:.1f}x), "
        f"peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    print_times()

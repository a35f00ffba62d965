"""One turn of one implementation of a case."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection
from typing import Any

import pytest

import lipfast

TURNS = 5
PRODUCT = "product of norms"

Implementations = dict[str, tuple[Callable[[], object], int]]
Benchmark = Any  # pytest-benchmark's fixture


def in_turn(
    *implementations: str, turns: int = TURNS, once: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrises a benchmark: turn 0 of every implementation comes before turn 1 of any.

    Args:
        implementations: their names.
        turns: of each.
        once: those that take so long that one turn has to do.
    """
    pairs = [
        (turn, name)
        for turn in range(turns)
        for name in implementations
        if not turn or name not in once
    ]
    return pytest.mark.parametrize(("turn", "implementation"), pairs)


def measure(
    benchmark: Benchmark,
    case: str,
    implementation: str,
    work: tuple[Callable[[], object], int],
    *,
    warmup: bool = True,
    operations: float | None = None,
) -> None:
    """Times one call after one warm-up; `work` is the call and the units that it does.

    Long calls may do without the warm-up. Where the result says so, the mean number of passes over
    a matrix goes into the table, and where `operations` says how many floating-point operations a
    unit is, however they are done, so does their rate.
    """
    call, units = work
    benchmark.extra_info.update(case=case, implementation=implementation, units=units)
    if operations is not None:
        benchmark.extra_info["operations"] = operations
    result = benchmark.pedantic(call, rounds=1, iterations=1, warmup_rounds=int(warmup))
    if isinstance(result, lipfast.SpectralNorms):
        benchmark.extra_info["passes"] = float(result.passes.double().mean())


def measure_bounds(
    benchmark: Benchmark,
    case: str,
    implementation: str,
    work: tuple[Callable[[], object], int],
    *,
    bar: str = "",
    warmup: bool = False,
) -> None:
    """Times a call that returns upper bounds, one or many, whose geometric mean is shown too.

    They stand in a table of their own, beside `PRODUCT` and what `bar` says is to be reached.
    """
    call, units = work
    benchmark.extra_info.update(case=case, implementation=implementation, units=units, bar=bar)
    result = benchmark.pedantic(call, rounds=1, iterations=1, warmup_rounds=int(warmup))
    bounds = result if isinstance(result, list) else [result]
    logs = [
        bound.log_value if isinstance(bound, lipfast.UpperBound) else math.log(bound)
        for bound in bounds
    ]
    benchmark.extra_info["log_bound"] = statistics.fmean(logs)

"""One turn of one implementation of a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TURNS = 5

Implementations = dict[str, tuple[Callable[[], object], int]]
Benchmark = Any  # pytest-benchmark's fixture


def in_turn(*implementations: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrises a benchmark: turn 0 of every implementation comes before turn 1 of any."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for mark in (
            pytest.mark.parametrize("implementation", implementations),
            pytest.mark.parametrize("turn", range(TURNS)),
        ):
            function = mark(function)
        return function

    return decorate


def measure(
    benchmark: Benchmark, case: str, implementation: str, work: tuple[Callable[[], object], int]
) -> None:
    """Times one call after one warm-up; `work` is the call and the units that it does."""
    call, units = work
    benchmark.extra_info.update(case=case, implementation=implementation, units=units)
    benchmark.pedantic(call, rounds=1, iterations=1, warmup_rounds=1)

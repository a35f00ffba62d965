"""Times implementations in turn within one run, and prints one table of ratios at the end.

A unit is what a case counts (a call, a sample, a checkpoint); a baseline may be measured on fewer
units. Each turn measures every implementation once; a figure is the median over the turns.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table

import lipfast
from bench.turns import PRODUCT


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """At most two threads, for lipfast and the baselines alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


ESTIMATE = "lipfast, estimate only"


Figure = tuple[float, float | None, float | None]


def _figures(config: pytest.Config) -> dict[str, dict[str, Figure]]:
    """case -> implementation -> median seconds per unit, passes, operations per unit if known.

    Without the cases whose bounds are compared.
    """
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    passes: dict[tuple[str, str], float] = {}
    operations: dict[str, float] = {}
    for benchmark in config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        info = benchmark.extra_info
        if "log_bound" in info:
            continue
        case, name = info["case"], info["implementation"]
        seconds[case][name].append(benchmark.stats.median / info["units"])
        if "passes" in info:
            passes[case, name] = info["passes"]
        if "operations" in info:
            operations[case] = info["operations"]
    return {
        case: {
            name: (statistics.median(values), passes.get((case, name)), operations.get(case))
            for name, values in implementations.items()
        }
        for case, implementations in seconds.items()
    }


class Bound(NamedTuple):
    """What one implementation found in a case: bound, median seconds per unit, what is to be."""

    log: float
    seconds: float
    bar: str


def _bounds(config: pytest.Config) -> dict[str, dict[str, Bound]]:
    """case -> implementation -> what it found."""
    found: dict[str, dict[str, list[Bound]]] = defaultdict(lambda: defaultdict(list))
    for benchmark in config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        info = benchmark.extra_info
        if "log_bound" in info:
            own = Bound(info["log_bound"], benchmark.stats.median / info["units"], info["bar"])
            found[info["case"]][info["implementation"]].append(own)
    return {
        case: {
            name: own[0]._replace(seconds=statistics.median(bound.seconds for bound in own))
            for name, own in implementations.items()
        }
        for case, implementations in found.items()
    }


def _table_of_bounds(found: dict[str, dict[str, Bound]]) -> Table:
    """Per case and implementation: the bound, how far it is below the product, and times."""
    table = Table(
        title="upper bounds (geometric means; ms per network, medians over turns of one run)",
        title_justify="left",
    )
    for heading in ("case", "implementation", "to be reached"):
        table.add_column(heading, no_wrap=heading != "case", overflow="fold")
    for heading in ("bound", "product / bound", "ms", "time / product's"):
        table.add_column(heading, justify="right")
    for case, implementations in found.items():
        product = implementations.get(PRODUCT)  # absent where only some were selected (-k)
        for number, (name, (log, seconds, bar)) in enumerate(implementations.items()):
            table.add_row(
                "" if number else case,
                name,
                bar,
                f"{math.exp(log):.7g}",
                f"{math.exp(product.log - log):.4g}" if product else "",
                f"{seconds * 1e3:.4g}",
                f"{seconds / product.seconds:.3g}x" if product else "",
            )
        table.add_section()
    return table


def _table_of_times(figures: dict[str, dict[str, Figure]]) -> Table:
    """Per case and implementation: the time per unit and its ratio to lipfast's."""
    table = Table(
        title="lipfast against plain PyTorch (medians over turns of one run)", title_justify="left"
    )
    for heading in ("case", "implementation"):
        table.add_column(heading)
    for heading in ("ms per unit", "ratio to lipfast", "to its estimate", "passes", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for case, implementations in figures.items():
        # Absent where only some implementations were selected (-k).
        ours = implementations.get("lipfast", (None,))[0]
        estimate = implementations.get(ESTIMATE, (None,))[0]
        for number, (name, (value, passes, operations)) in enumerate(implementations.items()):
            table.add_row(
                "" if number else case,
                name,
                f"{value * 1e3:.4g}",
                f"{value / ours:.3g}x" if ours else "",
                f"{value / estimate:.3g}x" if estimate else "",
                f"{passes:.3g}" if passes is not None else "",
                f"{operations / value / 1e9:.4g}" if operations is not None else "",
            )
        table.add_section()
    return table


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the tables that were measured, what was noted beside them, and with what."""
    tables = []
    if figures := _figures(config):
        tables.append(_table_of_times(figures))
    if bounds := _bounds(config):
        tables.append(_table_of_bounds(bounds))
    if not tables:
        return
    info = lipfast.info()
    console = Console(file=terminalreporter._tw._file, width=130)
    for table in tables:
        console.print()
        console.print(table)
    for benchmark in config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        if "note" in benchmark.extra_info:
            console.print(f"{benchmark.extra_info['case']}: {benchmark.extra_info['note']}")
    console.print(
        f"{min(2, torch.get_num_threads())} threads, capability {info['capability']}, "
        f"torch {info['torch']}, lipfast {info['lipfast']}; to read this: docs/performance.md"
    )

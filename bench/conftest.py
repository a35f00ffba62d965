"""Times implementations in turn within one run, and prints one table of ratios at the end.

A unit is what a case counts (a call, a sample, a checkpoint); a baseline may be measured on fewer
units. Each turn measures every implementation once; a figure is the median over the turns.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from rich.table import Table

import lipfast


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """At most two threads, for lipfast and the baselines alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def _figures(config: pytest.Config) -> dict[str, dict[str, float]]:
    """case -> implementation -> median seconds per unit."""
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for benchmark in config._benchmarksession.benchmarks:  # type: ignore[attr-defined]
        info = benchmark.extra_info
        seconds[info["case"]][info["implementation"]].append(benchmark.stats.median / info["units"])
    return {
        case: {name: statistics.median(values) for name, values in implementations.items()}
        for case, implementations in seconds.items()
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print, per case and implementation, the time per unit and its ratio to lipfast's."""
    figures = _figures(config)
    if not figures:
        return
    table = Table(
        title="lipfast against plain PyTorch (medians over turns of one run)", title_justify="left"
    )
    for heading in ("case", "implementation", "ms per unit", "ratio to lipfast"):
        table.add_column(
            heading, justify="left" if heading in ("case", "implementation") else "right"
        )
    for case, implementations in figures.items():
        ours = implementations["lipfast"]
        for name, value in implementations.items():
            table.add_row(
                case if name == "lipfast" else "",
                name,
                f"{value * 1e3:.4g}",
                f"{value / ours:.3g}x",
            )
        table.add_section()
    info = lipfast.info()
    console = Console(file=terminalreporter._tw._file, width=110)
    console.print()
    console.print(table)
    console.print(
        f"{min(2, torch.get_num_threads())} threads, capability {info['capability']}, "
        f"torch {info['torch']}, lipfast {info['lipfast']}; to read this: docs/performance.md"
    )

"""A progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipfast.scoring import Progress  # start-up time: torch


def progress_bar(quiet: bool) -> Any:
    """Return a context that gives a callback; None where nobody would see the bar."""
    return nullcontext(None) if quiet or not sys.stderr.isatty() else _rich_progress()


@contextmanager
def _rich_progress() -> Iterator[Callable[[Progress], None]]:
    from rich import progress  # noqa: PLC0415 (start-up time)
    from rich.console import Console  # noqa: PLC0415 (start-up time)

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[failed]}"),
    )
    # The stream itself: tracing turns sys.stderr aside for a while.
    console = Console(file=sys.stderr)
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None, rate="", failed="")

        def report(at: Progress) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            bar.update(
                task,
                description="scoring",
                completed=at.done,
                total=at.total,
                rate=f"{at.done / elapsed:.3g}/s" if elapsed > 0 else "",
                failed=f"{at.failed} failed" if at.failed else "",
            )

        yield report

"""Progress on stderr, for calls that take long, and only where someone can see it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds before anything is shown.
PATIENCE = 2.0


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that is told how many items are done.

    Nothing is written unless stderr is a terminal and `PATIENCE` is over; nothing stays afterwards.

    Args:
        label: what is being done.
        total: how many items there are, None if nobody knows.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 (slow to import, rarely needed)
    from rich.progress import Progress  # noqa: PLC0415 (the same)

    started = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)
    visible = False

    def advance(count: int) -> None:
        nonlocal visible
        bar.advance(task, count)
        if not visible and time.monotonic() - started >= PATIENCE:
            bar.start()
            visible = True

    try:
        yield advance
    finally:
        if visible:
            bar.stop()

"""Progress on stderr: a bar with the time left on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    """Reports that `amount` more of the work is done."""

    def __call__(self, amount: float, description: str) -> None:
        """Add to the work that is done and say what is being done."""


@contextmanager
def _bar(total: float, console: Console) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def advance(amount: float, description: str) -> None:
            progress.update(task, advance=amount, description=description)

        yield advance


@contextmanager
def _lines(total: float, every: float) -> Iterator[Advance]:
    started = printed = time.monotonic()
    done = 0.0
    lock = threading.Lock()

    def advance(amount: float, description: str) -> None:
        nonlocal done, printed
        with lock:
            done += amount
            now = time.monotonic()
            if now - printed < every or done <= 0:
                return
            printed = now
            left = (now - started) * (total - done) / done
            text = f"{description}: {done / total:.0%}, {left:.0f} s left"
        print(text, file=sys.stderr, flush=True)

    yield advance


@contextmanager
def progress_on_stderr(total: float, *, every: float = 5.0) -> Iterator[Advance]:
    """Show how much of `total` is done.

    Args:
        total: the work, in any unit.
        every: seconds between lines where stderr is no terminal.

    Yields:
        A function to call, from any thread, with the work done since the last call and what is
        being done.
    """
    console = Console(stderr=True)
    with _bar(total, console) if console.is_terminal else _lines(total, every) as advance:
        yield advance

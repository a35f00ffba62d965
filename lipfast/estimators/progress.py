"""Progress on stderr, for calls that take long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from lipfast.ops.interrupts import watched

if TYPE_CHECKING:
    from rich.progress import Progress

# Seconds before anything is shown that was not asked for.
PATIENCE = 2.0


@contextmanager
def shown_progress(
    label: str, total: int | None, show: bool | None
) -> Iterator[Callable[[int], None]]:
    """A function that is told how many items are done.

    Args:
        label: what is being done.
        total: how many items there are, None if nobody knows.
        show: None shows a bar on a terminal once `PATIENCE` is over, also while a single item takes
            long, and leaves nothing behind; False never; True from the start, and where stderr is
            no terminal as one line that stays, when all is done.
    """
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        yield lambda _: None
        return
    bar = _Bar(label, total, transient=terminal)
    timer = threading.Timer(PATIENCE, bar.show)
    timer.daemon = True
    if show or PATIENCE <= 0:
        bar.show()
    else:
        timer.start()
    try:
        # Where nobody knows how many items there are, a long op knows how far it is.
        with watched(bar.show_share) if total is None else nullcontext():
            yield bar.advance
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        bar.close()


class _Bar:
    """Made when it is shown: by then rich's time to import does not matter."""

    def __init__(self, label: str, total: int | None, *, transient: bool) -> None:
        self._label, self._total, self._transient = label, total, transient
        self._done = 0
        self._lock = threading.Lock()
        self._bar: Progress | None = None

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)

    def show_share(self, share: float) -> None:
        """Show how far one op of a step is; the next one begins anew."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], total=1.0, completed=share)

    def show(self) -> None:
        from rich.console import Console  # noqa: PLC0415 (slow to import, rarely needed)
        from rich.progress import Progress  # noqa: PLC0415 (slow to import, rarely needed)

        bar = Progress(console=Console(stderr=True), transient=self._transient)
        with self._lock:
            bar.add_task(self._label, total=self._total, completed=self._done)
            self._bar = bar
        bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

"""Write to a store in a thread of its own, so that scoring does not wait for the disk."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence

from lipfast.scoring.schema import Row
from lipfast.scoring.store import StoreWriter

_WAITING = 64  # batches; more than that and the scorer waits for the disk
_LOOK = 0.5  # seconds between looks at whether a part is due


class WriteBehind:
    """Takes rows at once and commits them soon.

    As a context manager it commits everything on the way out, after an error or Ctrl-C too.

    Args:
        path: the store's folder.

    Raises:
        StoreError: the store cannot be written: here, or from `append` and on the way out once
            the thread has found out.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._writer = StoreWriter(path)
        self._queue: queue.Queue[Sequence[Row] | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lipfast-write", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Time spent writing."""
        return self._writer.seconds

    def append(self, rows: Sequence[Row]) -> None:
        """Hand rows over.

        Raises:
            StoreError: earlier rows could not be written.
        """
        self._raise()
        self._queue.put(rows)

    def _run(self) -> None:
        rows: Sequence[Row] | None = ()
        while rows is not None:
            try:
                rows = self._queue.get(timeout=_LOOK)
            except queue.Empty:
                rows = ()
            if self._error is None:
                try:
                    self._write(rows)
                except BaseException as error:  # handed to the thread that appends
                    self._error = error

    def _write(self, rows: Sequence[Row] | None) -> None:
        if rows is None:
            self._writer.flush()
        elif rows:
            self._writer.append(rows)
        else:
            self._writer.flush_if_due()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        interrupt: KeyboardInterrupt | None = None
        while self._thread.is_alive():  # the last part is written even if Ctrl-C comes meanwhile
            try:
                self._queue.put(None)
                self._thread.join()
            except KeyboardInterrupt as pressed:  # noqa: PERF203
                interrupt = pressed
        if interrupt is not None:
            raise interrupt
        if error is None:
            self._raise()

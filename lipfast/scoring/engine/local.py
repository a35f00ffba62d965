"""The local engine: one process scores while a few threads read ahead."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from lipfast.checkpoints import CheckpointFile
from lipfast.scoring.order import interleaved
from lipfast.scoring.reading import Reading, read
from lipfast.scoring.schema import Row
from lipfast.scoring.scorer import Scorer
from lipfast.scoring.where import Where

WINDOW_FILES = 512
"""At most so many checkpoints are read, and then parted by plan, together."""

WINDOW_BYTES = 16 << 20
"""A window that holds so much is complete with its last whole batch."""

READERS = 2
"""Threads that read local files."""

REMOTE_READERS = 16
"""Threads that read where each file costs a round trip."""

_NICENESS = 10

Keep = Callable[[Reading], bool]


class LocalEngine:
    """Scores in this process.

    Args:
        scorer: how.
        memory: bytes of checkpoints to hold at most.
        where: which of them, by their metadata.

    Attributes:
        left_out: how many checkpoints `where` left out so far.
        workers: this process.
    """

    workers = 1

    def __init__(self, scorer: Scorer, memory: int, where: Where) -> None:
        self.left_out = 0
        self._scorer, self._memory, self._where = scorer, memory, where

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time by stage."""
        return self._scorer.seconds

    def run(self, files: Sequence[CheckpointFile]) -> Generator[list[Row], None, None]:
        """Yield the rows of the files, a batch at a time."""
        ordered = interleaved(files, self._scorer.options.batch_size)
        return run(ordered, self._scorer, self._memory, self._keep)

    def close(self) -> None:
        """Nothing to release."""

    def _keep(self, reading: Reading) -> bool:
        if reading.checkpoint is None or self._where.holds(reading.checkpoint.metadata):
            return True
        self.left_out += 1
        return False


def run(
    files: Sequence[CheckpointFile], scorer: Scorer, memory: int, keep: Keep = lambda reading: True
) -> Generator[list[Row], None, None]:
    """Score files, a window at a time, while the next window is read.

    Args:
        files: what to score, in the order of work.
        scorer: how.
        memory: bytes of checkpoints to hold at most; two windows share them. A checkpoint that is
            larger is still scored, alone.
        keep: whether to score what was read.

    Yields:
        Rows, a batch at a time.
    """
    remote = any(file.filesystem is not None and "::" not in file.uri for file in files)
    pool = ThreadPoolExecutor(
        REMOTE_READERS if remote else READERS, "lipfast-read", initializer=step_back
    )
    try:
        ahead: list[Future[Reading]] = []
        for window in _windows(files, memory // 2, scorer.options.batch_size):
            behind, ahead = ahead, [pool.submit(read, file) for file in window]
            yield from _score(behind, scorer, keep)
        yield from _score(ahead, scorer, keep)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def step_back() -> None:
    """Lower this thread's priority: parallel regions wait for the last of their threads.

    A reader on one of the cores delays them all. While nothing is computed readers have the cores.
    """
    if sys.platform == "linux":  # elsewhere the priority is the process's
        with suppress(OSError):
            thread = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(own + _NICENESS, 19))


def _score(futures: list[Future[Reading]], scorer: Scorer, keep: Keep) -> Iterator[list[Row]]:
    started = time.perf_counter()
    readings = [reading for reading in (future.result() for future in futures) if keep(reading)]
    waited = time.perf_counter() - started
    scorer.seconds["wait"] += waited
    futures.clear()  # what was read lives as long as it is needed, no longer
    if readings:
        yield from scorer.score(readings)


def _windows(
    files: Sequence[CheckpointFile], size: int, batch: int
) -> Iterator[list[CheckpointFile]]:
    """Cut files into windows; the first is one batch: nothing is scored while it is read."""
    window: list[CheckpointFile] = []
    filled, most = 0, min(batch, WINDOW_FILES)
    for file in files:
        enough = len(window) % batch == 0 and filled > WINDOW_BYTES
        if window and (enough or len(window) >= most or filled + file.size > size):
            yield window
            window, filled, most = [], 0, WINDOW_FILES
        window.append(file)
        filled += file.size
    if window:
        yield window

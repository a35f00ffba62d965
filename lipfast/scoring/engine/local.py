"""The local engine: one process scores while a few threads read ahead."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
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
        """Yield the rows of the files, a batch at a time, while later files are read.

        Two windows of files share the memory. A checkpoint that is larger is still scored, alone.
        """
        batch, prefix = self._scorer.options.batch_size, self._scorer.options.prefix
        remote = any(file.filesystem is not None and "::" not in file.uri for file in files)
        pool = ThreadPoolExecutor(
            REMOTE_READERS if remote else READERS, "lipfast-read", initializer=step_back
        )
        try:
            ahead: list[Future[Reading]] = []
            for window in _windows(interleaved(files, batch), self._memory // 2, batch):
                behind, ahead = ahead, [pool.submit(read, file, prefix) for file in window]
                yield from self._score(behind)
            yield from self._score(ahead)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _score(self, futures: list[Future[Reading]]) -> Iterator[list[Row]]:
        started = time.perf_counter()
        readings = list(filter(self._keep, (future.result() for future in futures)))
        self._scorer.seconds["wait"] += time.perf_counter() - started
        futures.clear()  # what was read lives as long as it is needed, no longer
        if readings:
            yield from self._scorer.score(readings)

    def close(self) -> None:
        """Nothing to release."""

    def _keep(self, reading: Reading) -> bool:
        if reading.checkpoint is None or self._where.holds(reading.checkpoint.metadata):
            return True
        self.left_out += 1
        return False


def step_back() -> None:
    """Lower this thread's priority: parallel regions wait for the last of their threads.

    A reader on one of the cores delays them all. While nothing is computed readers have the cores.
    """
    if sys.platform == "linux":  # elsewhere the priority is the process's
        with suppress(OSError):
            thread = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(own + _NICENESS, 19))


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

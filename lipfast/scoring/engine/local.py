"""The local engine: one process scores while a few threads read ahead."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain

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

# Local files that a reader takes at a time: less is spent on handing them over than on reading.
_HANDED_OVER = 16
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
        device: that it computes on, for the reader.
    """

    workers = 1

    def __init__(self, scorer: Scorer, memory: int, where: Where) -> None:
        self.left_out = 0
        self._scorer, self._memory, self._where = scorer, memory, where
        self.device = scorer.device.note

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time by stage."""
        return self._scorer.seconds

    def run(self, files: Sequence[CheckpointFile]) -> Generator[list[Row], None, None]:
        """Yield the rows of the files, a batch at a time, while later files are read.

        Two windows of files share the memory. A checkpoint that is larger is still scored, alone.
        """
        remote = any(file.filesystem is not None and "::" not in file.uri for file in files)
        pool = ThreadPoolExecutor(
            REMOTE_READERS if remote else READERS, "lipfast-read", initializer=step_back
        )
        try:
            yield from self._scorer.score(self._windows(files, pool, 1 if remote else _HANDED_OVER))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _windows(
        self, files: Sequence[CheckpointFile], pool: ThreadPoolExecutor, most_together: int
    ) -> Iterator[list[Reading]]:
        """Windows of readings; while one is scored the next is read."""
        batch, prefix = self._scorer.batch_size, self._scorer.options.prefix
        most, size = WINDOW_FILES, self._memory // 2
        if not self._scorer.device.is_cpu:
            # Beside two windows there are as many bytes in the buffers of what goes to the device.
            most, size = max(most, batch), self._memory // 4
        ahead: list[Future[list[Reading]]] = []
        for window in _windows(interleaved(files, batch), size, batch, most):
            together = max(1, min(most_together, len(window) // (2 * _HANDED_OVER)))
            parts = [window[at : at + together] for at in range(0, len(window), together)]
            behind, ahead = ahead, [pool.submit(_read_all, part, prefix) for part in parts]
            yield from self._read(behind)
        yield from self._read(ahead)

    def _read(self, futures: list[Future[list[Reading]]]) -> Iterator[list[Reading]]:
        started = time.perf_counter()
        readings = list(filter(self._keep, chain.from_iterable(f.result() for f in futures)))
        self._scorer.seconds["wait"] += time.perf_counter() - started
        futures.clear()  # what was read lives as long as it is needed, no longer
        if readings:
            yield readings

    def close(self) -> None:
        """Nothing to release."""

    def _keep(self, reading: Reading) -> bool:
        if reading.checkpoint is None or self._where.holds(reading.checkpoint.metadata):
            return True
        self.left_out += 1
        return False


def _read_all(files: Sequence[CheckpointFile], prefix: str | None) -> list[Reading]:
    return [read(file, prefix) for file in files]


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
    files: Sequence[CheckpointFile], size: int, batch: int, most_files: int
) -> Iterator[list[CheckpointFile]]:
    """Cut files into windows; the first is one batch: nothing is scored while it is read."""
    window: list[CheckpointFile] = []
    filled, most = 0, min(batch, most_files)
    for file in files:
        enough = len(window) % batch == 0 and filled > WINDOW_BYTES
        if window and (enough or len(window) >= most or filled + file.size > size):
            yield window
            window, filled, most = [], 0, most_files
        window.append(file)
        filled += file.size
    if window:
        yield window

"""The local engine: one process scores while a few threads read ahead.

Files that are small and at hand are read between batches instead. To read one takes some 80 us, of
which hardly any is waiting: a thread that does this beside the scorer takes as long from it in
turns of the interpreter's lock, several times over.
"""

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

SMALL_BYTES = 1 << 17
"""Local files of this size, on average, are read between batches, unless that means waiting."""

# Seconds that such a file may be waited for, on average.
_MOST_WAITING = 2e-4

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
            yield from self._scorer.score(self._windows(files, pool, remote))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _windows(
        self, files: Sequence[CheckpointFile], pool: ThreadPoolExecutor, remote: bool
    ) -> Iterator[list[Reading]]:
        """Windows of readings; while one is scored the next is read, unless that is quick."""
        batch, prefix = self._scorer.batch_size, self._scorer.options.prefix
        most, size = WINDOW_FILES, self._memory // 2
        if not self._scorer.device.is_cpu:
            # Beside two windows there are as many bytes in the buffers of what goes to the device.
            most, size = max(most, batch), self._memory // 4
        ordered = interleaved(files, batch)
        here = not remote and _are_small(ordered, size)
        done, here = self._read_here(ordered[:_HANDED_OVER]) if here else ([], False)
        # Nothing is scored while readers read the first window.
        first = most if here else min(batch, most)
        ahead: list[Future[list[Reading]]] = []
        for window in _windows(ordered[len(done) :], size, batch, first, most):
            readings, here = self._read_here(window) if here else ([], False)
            done, rest = done + readings, window[len(readings) :]
            if here:
                yield from self._kept(done)
            else:
                most_together = 1 if remote else _HANDED_OVER
                together = max(1, min(most_together, len(rest) // (2 * _HANDED_OVER)))
                parts = [rest[at : at + together] for at in range(0, len(rest), together)]
                behind, ahead = ahead, [pool.submit(_read_all, part, prefix) for part in parts]
                yield from self._kept(done, behind)
            done = []
        yield from self._kept(done, ahead)

    def _read_here(self, files: Sequence[CheckpointFile]) -> tuple[list[Reading], bool]:
        """Read files, up to those that have to be waited for; whether there were none."""
        started, readings, quick = time.perf_counter(), [], True
        for at in range(0, len(files), _HANDED_OVER):
            part = files[at : at + _HANDED_OVER]
            wall, own = time.perf_counter(), time.thread_time()
            readings += _read_all(part, self._scorer.options.prefix)
            waited = time.perf_counter() - wall - (time.thread_time() - own)
            quick = waited <= _MOST_WAITING * len(part)
            if not quick:
                break
        self._scorer.seconds["wait"] += time.perf_counter() - started
        return readings, quick

    def _kept(
        self, readings: list[Reading], futures: list[Future[list[Reading]]] | None = None
    ) -> Iterator[list[Reading]]:
        """Yield the readings that are asked for, with those that threads were given, as one."""
        started = time.perf_counter()
        read_ahead = chain.from_iterable(future.result() for future in futures or [])
        kept = list(filter(self._keep, chain(readings, read_ahead)))
        self._scorer.seconds["wait"] += time.perf_counter() - started
        if futures is not None:
            futures.clear()  # what was read lives as long as it is needed, no longer
        if kept:
            yield kept

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


def _are_small(files: Sequence[CheckpointFile], most: int) -> bool:
    size = sum(file.size for file in files)
    return size <= SMALL_BYTES * len(files) and most >= SMALL_BYTES * _HANDED_OVER


def _windows(
    files: Sequence[CheckpointFile], size: int, batch: int, first: int, most_files: int
) -> Iterator[list[CheckpointFile]]:
    """Cut files into windows, of which the first is of another length."""
    window: list[CheckpointFile] = []
    filled, most = 0, first
    for file in files:
        enough = len(window) % batch == 0 and filled > WINDOW_BYTES
        if window and (enough or len(window) >= most or filled + file.size > size):
            yield window
            window, filled, most = [], 0, most_files
        window.append(file)
        filled += file.size
    if window:
        yield window

"""The local engine: one process scores while a few threads read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lipfast.checkpoints import CheckpointFile
from lipfast.scoring.scorer import Reading, Scorer, read
from lipfast.scoring.store import Row

WINDOW_FILES = 512
"""Checkpoints that are read, and then sorted by plan, together."""

READERS = 2


def run(files: Sequence[CheckpointFile], scorer: Scorer, memory: int) -> Iterator[list[Row]]:
    """Score files, a window at a time, while the next window is read.

    Args:
        files: what to score.
        scorer: how.
        memory: bytes of checkpoints to hold at most; two windows share them. A checkpoint that is
            larger is still scored, alone.

    Yields:
        Rows, a batch at a time.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="lipfast-read")
    try:
        ahead: list[Future[Reading]] = []
        for window in _windows(files, memory // 2):
            behind, ahead = ahead, [pool.submit(read, file) for file in window]
            yield from _score(behind, scorer)
        yield from _score(ahead, scorer)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _score(futures: list[Future[Reading]], scorer: Scorer) -> Iterator[list[Row]]:
    if futures:
        yield from scorer.score([future.result() for future in futures])


def _windows(files: Sequence[CheckpointFile], size: int) -> Iterator[list[CheckpointFile]]:
    window: list[CheckpointFile] = []
    filled = 0
    for file in files:
        if window and (len(window) >= WINDOW_FILES or filled + file.size > size):
            yield window
            window, filled = [], 0
        window.append(file)
        filled += file.size
    if window:
        yield window

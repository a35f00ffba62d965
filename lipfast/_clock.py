"""How long native ops take: measured around their calls, for whoever asks and nobody else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_READING: ContextVar[Counter[str] | None] = ContextVar("lipfast._clock", default=None)


@contextmanager
def clocked(seconds: Counter[str]) -> Iterator[None]:
    """Add the time that native ops take inside the block, by name, to `seconds`.

    Counts the calls of this thread (of this context) alone. Blocks may be nested: the inner one
    counts.

    Example:
        >>> import torch
        >>> from collections import Counter
        >>> from lipfast import spectral_norms
        >>> seconds = Counter()
        >>> with clocked(seconds):
        ...     _ = spectral_norms([torch.eye(2)])
        >>> list(seconds), seconds["spectral_norms"] > 0
        (['spectral_norms'], True)
    """
    token = _READING.set(seconds)
    try:
        yield
    finally:
        _READING.reset(token)


@contextmanager
def running(op: str) -> Iterator[None]:
    """Say that the block is a call of a native op."""
    seconds = _READING.get()
    if seconds is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[op] += time.perf_counter() - started  # type: ignore[assignment]

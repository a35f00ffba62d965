"""How many of torch's threads a stretch of small operations uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial

import torch

from lipfast.ops.restoring import Restoring

_WORKERS: ContextVar[int | None] = ContextVar("lipfast.ops.threads", default=None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on this many threads, then as before.

    torch counts threads per calling thread: others are not affected, but for one whose very first
    operation falls into the block, which then starts with that many threads, too.

    Example:
        >>> import torch
        >>> with threads(2):
        ...     torch.get_num_threads()
        2
    """
    undo = Restoring(partial(torch.set_num_threads, torch.get_num_threads()))
    with undo, undo, undo:
        torch.set_num_threads(count)
        yield


def one_thread() -> AbstractContextManager[None]:
    """Compute on the calling thread alone, then as before.

    For many small operations in a row. With several threads each of them waits for the slowest
    thread; where other processes keep the processor busy that takes milliseconds, every time.

    Example:
        >>> import torch
        >>> before = torch.get_num_threads()
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    return threads(1)


@contextmanager
def native_ops_alone() -> Iterator[None]:
    """Leave torch's threads to the native ops; all else inside is done by the calling thread.

    Between native ops that take milliseconds there are dozens of small operations of torch, each of
    which would wait for all threads.

    Example:
        >>> import torch
        >>> before = torch.get_num_threads()
        >>> with native_ops_alone():
        ...     torch.get_num_threads(), native_workers() == before
        (1, True)
        >>> torch.get_num_threads() == before
        True
    """
    undo = Restoring(partial(_WORKERS.set, _WORKERS.get()))
    with undo, undo, undo:
        _WORKERS.set(native_workers())
        with one_thread():
            yield


def native_workers() -> int:
    """How many threads a native op is meant to use here."""
    return _WORKERS.get() or torch.get_num_threads()


def native_op() -> AbstractContextManager[None]:
    """Around the call of a native op: all threads that it may have."""
    workers = _WORKERS.get()
    return nullcontext() if workers is None else threads(workers)

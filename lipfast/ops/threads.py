"""How many of torch's threads a stretch of small operations uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from lipfast.ops.restoring import Restoring


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


@contextmanager
def one_thread() -> Iterator[None]:
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
    with threads(1):
        yield

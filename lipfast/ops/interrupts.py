"""Long native ops: signals such as Ctrl-C end them, and who waits hears how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lipfast import _native

_WATCHER: ContextVar[Callable[[float], None] | None] = ContextVar("lipfast.ops", default=None)


@contextmanager
def watched(call: Callable[[float], None]) -> Iterator[None]:
    """Have long ops inside the block say a few times a second which share of theirs is done."""
    token = _WATCHER.set(call)
    try:
        yield
    finally:
        _WATCHER.reset(token)


@contextmanager
def interruptible() -> Iterator[None]:
    """Stand around a native op that handles signals, and raise what their handlers raised.

    The op runs the handlers itself, about ten times a second where it is the main thread's, and
    ends soon after one of them raised; its own error is a RuntimeError of torch's.
    """
    watcher = _WATCHER.get()
    if watcher is not None:
        _native.watch(watcher)
    try:
        yield
    except RuntimeError as error:
        raised = _native.interrupt_of(error)
        if raised is None:
            raise
        raise raised from None
    finally:
        if watcher is not None:
            _native.watch(None)

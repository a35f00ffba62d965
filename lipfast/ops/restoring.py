"""What a block changes is put back when it ends, and to the end: also if Ctrl-C comes meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.overrides import _pop_mode


class Restoring:
    """Calls a function once when blocks are left, however they are.

    Ctrl-C may come between any two instructions, before the first one of a ``finally`` or of an
    ``__exit__``, too: then that is not run. So one object stands around a block three times, and
    two of them may be struck. What is interrupted begins again; the interrupt is raised afterwards.

    Args:
        restore: puts things back; called again, it finishes what it began.

    Examples:
        >>> from lipfast.ops.restoring import Restoring
        >>> undo = Restoring(lambda: print("as before"))
        >>> with undo, undo, undo:
        ...     print("changed")
        changed
        as before
    """

    __slots__ = ("_done", "_restore")

    def __init__(self, restore: Callable[[], object]) -> None:
        self._restore, self._done = restore, False

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._done:
            return
        interrupt: KeyboardInterrupt | None = None
        while not self._done:
            try:
                self._restore()
                self._done = True
            except KeyboardInterrupt as error:  # noqa: PERF203 (until it is done)
                interrupt = error
        if interrupt is not None:
            raise interrupt


class Modes:
    """Modes of torch and Python that are the process's, or the thread's, as they are now.

    Grad mode, autocast, the default dtype, the number of threads, kernels of attention, modes of
    torch functions, filters of warnings. Context managers of torch put them back, but for a Ctrl-C
    before their last line.
    """

    __slots__ = ("_attention", "_depth", "_filters", "_modes")

    def __init__(self, *, attention: bool = False) -> None:
        self._modes = _modes()
        self._depth = torch._C._len_torch_function_stack()
        self._filters = warnings.filters
        self._attention = _attention_kernels() if attention else None

    def restore(self) -> None:
        """Make them what they were."""
        while torch._C._len_torch_function_stack() > self._depth:
            _pop_mode()  # type: ignore[no-untyped-call]
        now = _modes()
        if now != self._modes:
            for before, current, write in zip(self._modes, now, _SETTERS, strict=True):
                if before != current:
                    write(before)
        if self._attention is not None and self._attention != _attention_kernels():
            for enabled, switch in zip(self._attention, _SWITCHES, strict=True):
                switch(enabled)
        if warnings.filters is not self._filters:
            warnings.filters = self._filters
            with warnings.catch_warnings():  # says that they have changed
                pass


def _modes() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )


_SETTERS: tuple[Callable[..., object], ...] = (
    torch.set_grad_enabled,
    lambda enabled: torch.set_autocast_enabled("cpu", enabled),
    lambda enabled: torch.set_autocast_enabled("cuda", enabled),
    torch.set_default_dtype,
    torch.set_num_threads,
)
_ENABLED: tuple[Callable[..., bool], ...] = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)
_SWITCHES = (
    torch.backends.cuda.enable_flash_sdp,
    torch.backends.cuda.enable_mem_efficient_sdp,
    torch.backends.cuda.enable_math_sdp,
    torch.backends.cuda.enable_cudnn_sdp,
)


def _attention_kernels() -> tuple[bool, ...]:
    return tuple(enabled() for enabled in _ENABLED)

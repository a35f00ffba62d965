"""Arithmetic as the proofs assume it, whatever mode of torch the caller is in."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lipfast.ops.restoring import Modes, Restoring

_FORWARD_MODE = threading.RLock()


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Neither gradients, nor inference tensors, nor autocast's shorter types.

    Examples:
        >>> import torch
        >>> from lipfast.ops.modes import plain_arithmetic
        >>> with torch.autocast("cpu"), plain_arithmetic():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    undo = Restoring(Modes().restore)
    with undo, undo, undo, torch.inference_mode(False):
        torch.set_grad_enabled(False)
        # What torch.autocast does in 4 us; what it keeps of the caller's casts stays.
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_enabled("cuda", False)
        yield


@contextmanager
def forward_mode() -> Iterator[None]:
    """Use torch's forward-mode derivatives, one thread at a time.

    torch counts the levels of dual numbers for the whole process: of two threads that use them,
    one takes away the other's level.

    Examples:
        >>> import torch
        >>> from lipfast.ops.modes import forward_mode
        >>> with forward_mode():
        ...     torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))[1]
        tensor([1.])
    """
    undo = Restoring(Modes().restore)
    with _FORWARD_MODE, undo, undo, undo, warnings.catch_warnings():
        # The first use of forward mode makes torch import its own deprecated torch.jit.script.
        warnings.filterwarnings("ignore", message="`torch.jit")
        yield

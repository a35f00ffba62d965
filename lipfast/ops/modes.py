"""Arithmetic as the proofs assume it, whatever mode of torch the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield

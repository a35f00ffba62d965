"""Whether this process rounds denormal numbers to zero, which the proofs in Python do not cover."""

from __future__ import annotations

import torch

FLUSHED = (
    "denormal numbers are rounded to zero here, which the proof does not cover: call "
    "torch.set_flush_denormal(False) before anything else"
)
# Fewer elements than this per thread, and torch would not use all of its threads.
_GRAIN = 32768
# Every thread meets some denormal numbers; arithmetic with them is slow, so that few have to do.
_SPACING = 1024


def denormals_flushed() -> bool:
    """Whether the calling thread or a thread of torch's pool rounds denormals to zero.

    The mode belongs to a thread: `torch.set_flush_denormal` sets that of its caller, threads
    inherit that of their creator, and libraries built with ``-ffast-math`` set it when loaded.

    Examples:
        >>> from lipfast.ops.denormals import denormals_flushed
        >>> denormals_flushed()
        False
    """
    threads = torch.get_num_threads()
    size = _GRAIN * threads if threads > 1 else _SPACING
    numbers = torch.ones(size, dtype=torch.float64, device="cpu")
    numbers[::_SPACING] = 2.0**-1074
    return bool(((numbers * 2.0)[::_SPACING] == 0.0).any())

"""Whether this process rounds denormal numbers to zero, which the proofs in Python do not cover."""

from __future__ import annotations

import torch

FLUSHED = (
    "denormal numbers are rounded to zero here, which the proof does not cover: call "
    "torch.set_flush_denormal(False) before anything else"
)
# Fewer elements than this per thread, and torch would not use all of its threads.
_GRAIN = 32768
_LEAST = 2.0**-1074
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
    # Python's products are in the calling thread's mode, and a hundred times faster than torch's.
    if 2.0 * _LEAST == 0.0:
        return True
    threads = torch.get_num_threads()
    if threads == 1:
        return False
    numbers = torch.ones(_GRAIN * threads, dtype=torch.float64, device="cpu")
    tested = numbers[::_SPACING]
    tested.fill_(_LEAST)
    numbers.mul_(2.0)
    return bool((tested == 0.0).any())

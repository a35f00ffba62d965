"""Whether a device's library computes products of float64 with shorter numbers.

Running error bounds hold for IEEE products and sums in any order. cuBLAS may emulate float64 by
products of integers (the Ozaki scheme), with errors relative to the largest entries of rows and
columns, not to ``|A| |B|``: where it was told to, nothing is proved of what it multiplies.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

# What asks cuBLAS for it; off where it is not set.
_SWITCH = "CUBLAS_EMULATE_DOUBLE_PRECISION"
_PROBE_SIDES = (16, 300)
# Beside entries of this size a slice of an emulation has no bits left for those around 1.
_BESIDE = 2.0**80


def products_are_ieee(device: torch.device) -> bool:
    """Whether products of float64 matrices on a device are sums of IEEE products.

    On CUDA two products are looked at once per process and device, which waits for it: rows with
    large entries, which meet zeros, beside entries around 1 with all their bits.

    Example:
        >>> products_are_ieee(torch.device("cpu"))
        True
    """
    return device.type != "cuda" or (
        os.environ.get(_SWITCH, "0") in ("", "0") and _keeps_small_entries(device)
    )


@cache
def _keeps_small_entries(device: torch.device) -> bool:
    with torch.inference_mode(False), torch.no_grad():
        exact = [_product_is_exact(side, device) for side in _PROBE_SIDES]
        return bool(torch.stack(exact).all())


def _product_is_exact(side: int, device: torch.device) -> Tensor:
    identity = torch.eye(side, dtype=torch.float64, device=device)
    a = torch.cat([identity * (1.0 + 2.0**-52), torch.full_like(identity, _BESIDE)], 1)
    b = torch.cat([identity, torch.zeros_like(identity)])
    return (a @ b == identity * (1.0 + 2.0**-52)).all()

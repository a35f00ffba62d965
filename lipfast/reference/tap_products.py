"""Products of a kernel's taps, by two loops over the taps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def tap_products(taps: Tensor, axes: Sequence[int]) -> Tensor:
    r"""$R_j = \sum_k W_{k+j} W_k^T$: (symbols, differences, n, n), float64.

    Args:
        taps: $W_k$, (symbols, taps, n, m), the last axis of places fastest.
        axes: taps per axis.

    Example:
        >>> tap_products(torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1), (2, 1, 1)).flatten()
        tensor([13.,  6.], dtype=torch.float64)
    """
    places = list(itertools.product(*map(range, axes)))
    differences = [
        j
        for j in itertools.product(*(range(1 - size, size) for size in axes))
        if j >= (0,) * len(axes)
    ]
    w = taps.double()
    found = torch.zeros(len(w), len(differences), *[w.shape[2]] * 2, dtype=torch.float64)
    for index, j in enumerate(differences):
        for k, place in enumerate(places):
            moved = tuple(a + b for a, b in zip(place, j, strict=True))
            if moved in places:
                found[:, index] += w[:, places.index(moved)] @ w[:, k].mT
    return found

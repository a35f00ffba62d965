"""Products of a kernel's taps, of which the Gram matrices of its symbol are made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, check_terms


def tap_differences(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Differences of two places: zero, then those with a positive first number that is not zero.

    Example:
        >>> tap_differences((2, 2))
        [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    """
    found = list(itertools.product(*(range(1 - size, size) for size in axes)))
    return found[len(found) // 2 :]


def tap_products(taps: Tensor, axes: Sequence[int]) -> Tensor:
    r"""$R_j = \sum_k W_{k+j} W_k^T$, of which the Gram matrices of symbols are made.

    For $\hat W(\theta) = \sum_k W_k e^{i k \theta}$ that is $\hat W(\theta) \hat W(\theta)^* =
    R_0 + \sum_{j > 0} (e^{i j \theta} R_j + e^{-i j \theta} R_j^T)$. Every entry is a plain sum of
    at most T m products in any order and in IEEE float64. On CUDA this is lipfast's own kernel,
    because libraries may emulate float64 there.

    Args:
        taps: $W_k$, (symbols, T, n, m), float64, the last axis of places fastest.
        axes: taps per axis: three numbers.

    Returns:
        (symbols, differences, n, n), float64, in the order of `tap_differences`.

    Raises:
        ArgumentError: wrong types, dtypes or shapes, or T m is 2^30 or more.

    Example:
        >>> import torch
        >>> from lipfast.ops.tap_products import tap_products
        >>> taps = torch.tensor([2.0, 3.0], dtype=torch.float64).reshape(1, 2, 1, 1)
        >>> tap_products(taps, (2, 1, 1)).flatten()
        tensor([13.,  6.], dtype=torch.float64)
    """
    if check_floating(taps, "taps", 4).dtype != torch.float64:
        raise ArgumentError(f"taps: expected float64, got {taps.dtype}")
    counts = [int(size) for size in axes]
    if len(counts) != 3 or min(counts) < 1 or counts[0] * counts[1] * counts[2] != taps.shape[1]:
        raise ArgumentError(
            f"axes: expected three sizes with a product of {taps.shape[1]}, got {tuple(counts)}"
        )
    if 0 in taps.shape[2:]:
        raise ArgumentError(f"taps: shape {tuple(taps.shape)} holds empty matrices")
    check_terms(taps.shape[1] * taps.shape[3], "taps")
    found: Tensor = torch.ops.lipfast.tap_products(taps.detach().contiguous(), counts)
    return found


@torch.library.register_fake("lipfast::tap_products")
def _tap_products_fake(taps: Tensor, axes: Sequence[int]) -> Tensor:
    symbols, _, n, _ = taps.shape
    return taps.new_empty((symbols, len(tap_differences(axes)), n, n))


@torch.library.impl("lipfast::tap_products", "CPU")
def _tap_products_cpu(taps: Tensor, axes: Sequence[int]) -> Tensor:
    """The CPU's own search has products of its own (csrc/kernels/cpu/conv_grams.h)."""
    w = taps.reshape(len(taps), *axes, *taps.shape[2:])
    found = []
    for j in tap_differences(axes):
        ends = [
            (slice(max(step, 0), size + min(step, 0)), slice(max(-step, 0), size - max(step, 0)))
            for step, size in zip(j, axes, strict=True)
        ]
        moved, still = (w[(slice(None), *side)].flatten(1, 3) for side in zip(*ends, strict=True))
        found.append(moved.transpose(1, 2).flatten(2) @ still.transpose(1, 2).flatten(2).mT)
    return torch.stack(found, 1)

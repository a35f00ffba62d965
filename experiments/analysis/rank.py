"""Rank correlation: whether two quantities rise together."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lipfast.errors import ArgumentError


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation (1904); ties have their mean rank.

    Args:
        x: (n,).
        y: (n,).

    Returns:
        Between -1 and 1; NaN where one of them is constant.

    Raises:
        ArgumentError: shapes differ or there are fewer than two points.

    Example:
        >>> rank_correlation([1, 2, 3], [1, 10, 100])
        1.0
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1 or len(xs) < 2:
        raise ArgumentError(f"x and y must be (n,) with n >= 2, got {xs.shape} and {ys.shape}")
    dx, dy = (ranks - ranks.mean() for ranks in (_ranks(xs), _ranks(ys)))
    size = float(np.sqrt((dx @ dx) * (dy @ dy)))
    return float(dx @ dy) / size if size > 0 else float("nan")

"""Distributions of per-sample Jacobian norms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lipfast.errors import ArgumentError


@dataclass(frozen=True)
class NormHistogram:
    """A histogram with bins of equal ratio.

    Attributes:
        edges: (bins + 1,), ascending.
        counts: int64 (bins,); their sum is the number of samples.
        median: of the norms.
        largest: the study's C_lower.
        tail: largest over median: how far the worst sample is from a typical one.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    median: float
    largest: float
    tail: float


def norm_histogram(
    norms: ArrayLike, *, bins: int = 30, limits: tuple[float, float] | None = None
) -> NormHistogram:
    """Count the norms ``||J(x_i)||_2`` of the samples in logarithmic bins.

    Appendix 3.15 of Khromov and Singh: the largest norm alone says little about how smooth the
    function is at most samples.

    Args:
        norms: (B,), not negative; `jacobian_norms` or `lower_bound(..., per_sample=True)`.
        bins: how many.
        limits: positive ends of the first and the last bin, by default those of the norms. Norms
            outside count in the first or last bin: the sum of the counts is B.

    Raises:
        ArgumentError: there are no norms, one is negative or NaN, or limits are wrong.

    Example:
        >>> histogram = norm_histogram([1.0, 1.0, 10.0, 100.0], bins=2)
        >>> histogram.counts.tolist(), histogram.median, histogram.largest
        ([2, 2], 5.5, 100.0)
    """
    values = np.asarray(norms, dtype=np.float64).ravel()
    if len(values) == 0 or not np.all(values >= 0):
        raise ArgumentError("a histogram needs at least one norm, and none negative or NaN")
    positive = values[values > 0]
    if limits is None:
        limits = (float(positive.min()), float(positive.max())) if len(positive) else (0.5, 2.0)
        if limits[0] == limits[1]:
            limits = (limits[0] / 2, limits[1] * 2)
    low, high = limits
    if not 0 < low < high:
        raise ArgumentError(f"limits must be positive and ascending, got {limits}")
    edges = np.geomspace(low, high, bins + 1)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1)
    median = float(np.median(values))
    largest = float(values.max())
    return NormHistogram(
        edges=edges,
        counts=np.bincount(place, minlength=bins).astype(np.int64),
        median=median,
        largest=largest,
        tail=largest / median if median > 0 else float("inf"),
    )

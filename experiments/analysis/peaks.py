"""Peak alignment: how far a bound peaks from the width at which the test loss does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lipfast.errors import ArgumentError

# All S^S samples of S seeds are enumerated up to five seeds (3125 samples).
_ENUMERATED = 5


@dataclass(frozen=True)
class PeakAlignment:
    """Where two curves over the same widths peak.

    Attributes:
        reference: width at which the mean over seeds of the reference curve is largest.
        width: the same for the other curve.
        octaves: log2(width / reference): 0 when aligned, 1 when the peak is at twice the width.
        steps: places in the list of widths between the two peaks.
        low: lower end of the bootstrap interval of `octaves`.
        high: its upper end.
        confidence: nominal level of the interval.
        seeds: number of seeds.
    """

    reference: int
    width: int
    octaves: float
    steps: int
    low: float
    high: float
    confidence: float
    seeds: int

    @property
    def aligned(self) -> bool:
        """Whether the peaks are at the same or at neighbouring widths."""
        return self.steps <= 1


def _samples(seeds: int, draws: int, seed: int) -> NDArray[np.int64]:
    if seeds <= _ENUMERATED:
        return np.array(list(itertools.product(range(seeds), repeat=seeds)))
    return np.random.default_rng(seed).integers(seeds, size=(draws, seeds))


def peak_alignment(
    widths: ArrayLike,
    reference: ArrayLike,
    curve: ArrayLike,
    *,
    confidence: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> PeakAlignment:
    """``log2(argmax_w mean_s curve / argmax_w mean_s reference)`` and its bootstrap interval.

    The interval is Efron's percentile interval (1979) over seeds: both curves are averaged over the
    same S seeds drawn with replacement, and the quotient of their peak widths is taken anew. Up to
    five seeds all S^S samples are enumerated, so the interval has no randomness of its own. Two
    seeds have only three different samples: their interval is indicative at best.

    Args:
        widths: (W,), ascending.
        reference: (S, W), for example the test loss of every seed at every width; NaN where a run
            is missing.
        curve: (S, W), for example the upper bound.
        confidence: of the interval.
        draws: bootstrap samples where they are not enumerated.
        seed: of those draws.

    Raises:
        ArgumentError: shapes do not fit, or a width has no run in one of the curves.

    Example:
        >>> loss = [[1.0, 3.0, 2.0], [1.0, 4.0, 2.0]]
        >>> bound = [[1.0, 2.0, 3.0], [1.0, 5.0, 3.0]]
        >>> alignment = peak_alignment([8, 16, 32], loss, bound)
        >>> alignment.reference, alignment.width, alignment.octaves, alignment.high
        (16, 16, 0.0, 1.0)
    """
    grid = np.asarray(widths, dtype=np.int64)
    first, second = np.asarray(reference, np.float64), np.asarray(curve, np.float64)
    if first.ndim != 2 or first.shape != second.shape or first.shape[1] != len(grid):
        raise ArgumentError(
            f"reference and curve must be (seeds, {len(grid)}), got {first.shape}, {second.shape}"
        )
    for values in (first, second):
        if np.isnan(values).all(axis=0).any():
            raise ArgumentError("a width has no run with a value; leave that width out")

    def peaks(chosen: NDArray[np.int64]) -> tuple[int, int]:
        columns = [values[chosen] for values in (first, second)]
        # A width whose only runs were not drawn has no mean and cannot be the peak.
        sums = [np.nansum(values, axis=0) for values in columns]
        counts = [np.maximum((~np.isnan(values)).sum(axis=0), 1) for values in columns]
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        return int(np.argmax(means[0])), int(np.argmax(means[1]))

    at_reference, at_curve = peaks(np.arange(len(first)))
    pairs = np.array([peaks(chosen) for chosen in _samples(len(first), draws, seed)])
    octaves = np.log2(grid[pairs[:, 1]] / grid[pairs[:, 0]])
    tail = (1 - confidence) / 2
    low, high = np.quantile(octaves, [tail, 1 - tail], method="inverted_cdf")
    return PeakAlignment(
        reference=int(grid[at_reference]),
        width=int(grid[at_curve]),
        octaves=float(np.log2(grid[at_curve] / grid[at_reference])),
        steps=abs(at_curve - at_reference),
        low=float(low),
        high=float(high),
        confidence=confidence,
        seeds=len(first),
    )

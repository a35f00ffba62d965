"""Whether a curve rises to a peak inside its range and falls again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lipfast.errors import ArgumentError


@dataclass(frozen=True)
class Peak:
    """The peak of a positive curve.

    Attributes:
        index: of the largest value.
        rise: that value over the smallest one before it; 1 if the peak is the first point.
        fall: that value over the smallest one after it; 1 if the peak is the last point.
    """

    index: int
    rise: float
    fall: float

    def visible(self, factor: float = 1.1) -> bool:
        """Say whether the peak stands out by `factor` from both of its sides."""
        return self.rise >= factor and self.fall >= factor


def find_peak(curve: ArrayLike) -> Peak:
    """Find the largest value of a curve and how far it stands out.

    The double descent of Khromov and Singh (section 4) is a curve against width with such a peak
    at the interpolation threshold. (That the test loss also falls before it rises is part of its
    definition, but outside of the widths of most sweeps.)

    Args:
        curve: (n,), positive; NaN is skipped.

    Raises:
        ArgumentError: no value is a positive number.

    Example:
        >>> find_peak([2.0, 1.0, 4.0, 3.0, 2.0])
        Peak(index=2, rise=4.0, fall=2.0)
    """
    values = np.asarray(curve, dtype=np.float64)
    if values.ndim != 1 or not np.any(values > 0):
        raise ArgumentError("a curve needs one dimension and a positive value")
    return _peak_at(values, int(np.nanargmax(values)))


def find_inner_peak(curve: ArrayLike) -> Peak | None:
    """Find the local maximum inside a curve that stands out most, by the smaller of its factors.

    Where the narrowest networks do not learn, the largest test loss is theirs, and a peak at the
    interpolation threshold is a local one.

    Args:
        curve: (n,), positive; NaN is skipped.

    Returns:
        The peak, None if no point inside lies above both of its neighbours.

    Example:
        >>> find_inner_peak([9.0, 1.0, 4.0, 3.0, 2.0])
        Peak(index=2, rise=4.0, fall=2.0)
    """
    values = np.asarray(curve, dtype=np.float64)
    present = np.flatnonzero(np.isfinite(values))
    inner = [
        int(place)
        for before, place, after in zip(present, present[1:], present[2:], strict=False)
        if values[place] > max(values[before], values[after])
    ]
    peaks = [_peak_at(values, place) for place in inner]
    return max(peaks, key=lambda peak: min(peak.rise, peak.fall), default=None)


def _peak_at(values: NDArray[np.float64], index: int) -> Peak:
    top = float(values[index])

    def over_smallest(side: NDArray[np.float64]) -> float:
        side = side[np.isfinite(side)]
        return top / float(side.min()) if len(side) and side.min() > 0 else 1.0

    return Peak(index, over_smallest(values[:index]), over_smallest(values[index + 1 :]))

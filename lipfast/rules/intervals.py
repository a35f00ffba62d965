"""Arrays of intervals in float64, every operation rounded outward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipfast.rounding import UNIT_ROUNDOFF
from lipfast.rules.running_errors import EVALUATION_ROUNDOFFS

Array: TypeAlias = NDArray[np.float64]
Choice: TypeAlias = NDArray[np.bool_]


def down(x: Array) -> Array:
    """The float64 below what was rounded to x."""
    found: Array = np.nextafter(x, -np.inf)
    return found


def up(x: Array) -> Array:
    """The float64 above what was rounded to x."""
    found: Array = np.nextafter(x, np.inf)
    return found


@dataclass(frozen=True)
class Interval:
    """All real numbers from `low` to `high`, for every entry of two arrays.

    Ends may be infinite. What is computed holds every result for numbers of the operands.
    Operations overflow to infinity on purpose: call them within ``numpy.errstate(all="ignore")``.

    Examples:
        >>> third = Interval.of(3.0).reciprocal()
        >>> bool(third.low < 1 / 3 < third.high), bool((third * Interval.of(3.0)).high >= 1.0)
        (True, True)
    """

    low: Array
    high: Array

    @staticmethod
    def of(low: Array | float, high: Array | float | None = None) -> Interval:
        """The interval between two ends, or of one number; NaN for an end says nothing."""
        first = np.asarray(low, dtype=np.float64)
        last = first if high is None else np.asarray(high, dtype=np.float64)
        unknown = np.isnan(first) | np.isnan(last)
        if not unknown.any():
            return Interval(first, last)
        return Interval(np.where(unknown, -np.inf, first), np.where(unknown, np.inf, last))

    @property
    def size(self) -> Array:
        """The largest magnitude."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def least(self) -> Array:
        """The smallest magnitude."""
        return np.maximum(np.maximum(self.low, -self.high), 0.0)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __add__(self, other: Interval) -> Interval:
        return Interval.of(down(self.low + other.low), up(self.high + other.high))

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        # 0 times inf: an infinite end is no number of the interval.
        ends = [np.where(np.isnan(end), 0.0, end) for end in ends]
        low = np.minimum(np.minimum(ends[0], ends[1]), np.minimum(ends[2], ends[3]))
        high = np.maximum(np.maximum(ends[0], ends[1]), np.maximum(ends[2], ends[3]))
        return Interval(down(low), up(high))

    def reciprocal(self) -> Interval:
        """``1 / x``; everything where 0 is in the interval."""
        zero = (self.low <= 0.0) & (self.high >= 0.0)
        low, high = down(1.0 / self.high), up(1.0 / self.low)
        return Interval(np.where(zero, -np.inf, low), np.where(zero, np.inf, high))

    def square(self) -> Interval:
        """``x^2``, at least 0."""
        low, high = self.least, self.size
        return Interval(np.maximum(down(low * low), 0.0), up(high * high))

    def within(self, low: float, high: float) -> Interval:
        """What is known to lie between two numbers."""
        return Interval(np.clip(self.low, low, high), np.clip(self.high, low, high))

    def met(self, other: Interval) -> Interval:
        """What lies in both, for two intervals that hold the same number."""
        return Interval(np.maximum(self.low, other.low), np.minimum(self.high, other.high))

    def hull(self, other: Interval) -> Interval:
        """What lies in either."""
        return Interval(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def where(self, chosen: Choice, other: Interval) -> Interval:
        """Itself where `chosen`, the other elsewhere."""
        return Interval(
            np.where(chosen, self.low, other.low), np.where(chosen, self.high, other.high)
        )


WHOLE = Interval.of(-np.inf, np.inf)


def evaluated(function: Callable[[Tensor], Tensor], x: Array) -> Interval:
    """A function at numbers, with what is assumed of torch's kernels: see `EVALUATION_ROUNDOFFS`.

    At infinity it is taken to be exact.
    """
    array = np.array(x, dtype=np.float64, ndmin=1)
    value = function(torch.from_numpy(array)).numpy().reshape(np.shape(x))
    room = (np.abs(x) + np.abs(value) + 1.0) * (2 * EVALUATION_ROUNDOFFS * UNIT_ROUNDOFF)
    room = np.where(np.isinf(x), 0.0, room)
    return Interval.of(down(value - room), up(value + room))


def rising(function: Callable[[Tensor], Tensor], x: Interval) -> Interval:
    """The values of an increasing function."""
    return Interval(evaluated(function, x.low).low, evaluated(function, x.high).high)


def even(function: Callable[[Tensor], Tensor], x: Interval) -> Interval:
    """The values of an even function that decreases away from 0."""
    return Interval(evaluated(function, x.size).low, evaluated(function, x.least).high)

"""Functions of one variable on intervals: values, slopes and curvatures.

A `Jet` holds a function, its derivative and its second derivative on an interval of the variable.
Where a function has a kink, "derivative" is everything between those of both sides, and nothing
is known of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipfast.rules.intervals import WHOLE, Array, Choice, Interval, evaluated, even, rising

ONE = Interval.of(1.0)
TWO = Interval.of(2.0)
_ZERO = Interval.of(0.0)
_HALF = Interval.of(0.5)
# Beyond, functions that saturate are bounded by their values here: rooms for rounding stay small.
_FARTHEST = 60.0
# 2 / sqrt(pi)
_ERF_SLOPE = Interval.of(math.nextafter(1.1283791670955126, 0), 1.1283791670955128)


class Taken(NamedTuple):
    """What a function makes of an interval: its values, slopes and curvatures."""

    value: Interval
    slope: Interval
    curve: Interval


@dataclass(frozen=True)
class Jet:
    """A function of x on an interval of x, with two derivatives."""

    value: Interval
    slope: Interval
    curve: Interval

    @staticmethod
    def constant(value: Interval) -> Jet:
        """A function that is the same for all x."""
        return Jet(value, _ZERO, _ZERO)

    def __add__(self, other: Jet) -> Jet:
        return Jet(self.value + other.value, self.slope + other.slope, self.curve + other.curve)

    def __neg__(self) -> Jet:
        return Jet(-self.value, -self.slope, -self.curve)

    def __mul__(self, other: Jet) -> Jet:
        return Jet(
            self.value * other.value,
            self.slope * other.value + self.value * other.slope,
            self.curve * other.value + TWO * (self.slope * other.slope) + self.value * other.curve,
        )

    def square(self) -> Jet:
        """The square of the function."""
        curve = TWO * (self.slope.square() + self.value * self.curve)
        return Jet(self.value.square(), TWO * (self.value * self.slope), curve)

    def larger(self, other: Jet) -> Jet:
        """The maximum of two functions; a kink where they may cross."""
        first = self.value.low >= other.value.high
        second = other.value.low >= self.value.high
        value = Interval(
            np.maximum(self.value.low, other.value.low),
            np.maximum(self.value.high, other.value.high),
        )
        slope = self.slope.hull(other.slope)
        return Jet(
            value,
            self.slope.where(first, other.slope.where(second, slope)),
            self.curve.where(first, other.curve.where(second, WHOLE)),
        )

    def then(self, function: str) -> Jet:
        """One of `FUNCTIONS` of this function."""
        value, slope, curve = FUNCTIONS[function](self.value)
        return Jet(value, slope * self.slope, curve * self.slope.square() + slope * self.curve)


def _saturating(
    function: Callable[[Tensor], Tensor], x: Interval, low: float, high: float
) -> Interval:
    """Values of an increasing function between two limits."""
    least = evaluated(function, np.clip(x.low, -_FARTHEST, _FARTHEST)).low
    most = evaluated(function, np.clip(x.high, -_FARTHEST, _FARTHEST)).high
    found = Interval(
        np.where(x.low < -_FARTHEST, low, least), np.where(x.high > _FARTHEST, high, most)
    )
    return found.within(low, high)


def _bell(function: Callable[[Tensor], Tensor], x: Interval, top: float) -> Interval:
    """Values of an even function that decreases to 0 away from 0."""
    near = Interval(np.clip(x.low, -_FARTHEST, _FARTHEST), np.clip(x.high, -_FARTHEST, _FARTHEST))
    found = even(function, near)
    return Interval(np.where(x.size > _FARTHEST, 0.0, found.low), found.high).within(0.0, top)


def _of_sigmoid(x: Interval) -> Taken:
    value = _saturating(torch.sigmoid, x, 0.0, 1.0)
    slope = _bell(lambda t: torch.sigmoid(t) * torch.sigmoid(-t), x, 0.25)
    return Taken(value, slope, slope * (ONE - TWO * value))


def _of_tanh(x: Interval) -> Taken:
    value = _saturating(torch.tanh, x, -1.0, 1.0)
    slope = _bell(lambda t: 1.0 - torch.tanh(t).square(), x, 1.0)
    return Taken(value, slope, -(TWO * (slope * value)))


def _exponential(x: Interval) -> Interval:
    least = evaluated(torch.exp, np.maximum(x.low, -_FARTHEST)).low
    found = Interval(
        np.where(x.low < -_FARTHEST, 0.0, least),
        evaluated(torch.exp, np.maximum(x.high, -_FARTHEST)).high,
    )
    return found.within(0.0, math.inf)


def _of_exp(x: Interval) -> Taken:
    value = _exponential(x)
    return Taken(value, value, value)


def _of_erf(x: Interval) -> Taken:
    slope = _ERF_SLOPE * _exponential(-x.square())
    value = _saturating(torch.special.erf, x, -1.0, 1.0)
    return Taken(value, slope, -(TWO * (x * slope)))


def _of_softplus(x: Interval) -> Taken:
    value, slope, _ = _of_sigmoid(x)
    own = rising(lambda t: torch.logaddexp(t, torch.zeros_like(t)), x)
    far = Interval(np.where(x.low < -_FARTHEST, 0.0, own.low), own.high)
    return Taken(far.within(0.0, math.inf), value, slope)


def _of_log(x: Interval) -> Taken:
    inside = Interval(np.maximum(x.low, 0.0), np.maximum(x.high, 0.0))
    slope = x.reciprocal()
    value = rising(torch.log, inside)
    known = x.low > 0.0
    return Taken(value.where(known, WHOLE), slope.where(known, WHOLE), -slope.square())


def _of_root(x: Interval) -> Taken:
    inside = Interval(np.maximum(x.low, 0.0), np.maximum(x.high, 0.0))
    value = rising(torch.sqrt, inside).within(0.0, math.inf)
    slope = (TWO * value).reciprocal()
    known = x.low > 0.0
    curve = -(_HALF * slope) * x.reciprocal()
    return Taken(
        value.where(x.low >= 0.0, WHOLE), slope.where(known, WHOLE), curve.where(known, WHOLE)
    )


def _wave(function: Callable[[Tensor], Tensor], x: Interval) -> Interval:
    """Values of a function of slope at most 1 between -1 and 1."""
    middle = x.low + (x.high - x.low) / 2
    near = evaluated(function, middle)
    reach = Interval.of(x.high) - Interval.of(x.low)  # more than half of it, wherever `middle` is
    return (near + Interval(-reach.size, reach.size)).within(-1.0, 1.0)


def _of_sin(x: Interval) -> Taken:
    value = _wave(torch.sin, x)
    return Taken(value, _wave(torch.cos, x), -value)


def _of_cos(x: Interval) -> Taken:
    value = _wave(torch.cos, x)
    return Taken(value, -_wave(torch.sin, x), -value)


def _of_atan(x: Interval) -> Taken:
    slope = (ONE + x.square()).reciprocal().within(0.0, 1.0)
    return Taken(rising(torch.atan, x), slope, -(TWO * (x * slope.square())))


def _of_inverse(x: Interval) -> Taken:
    value = x.reciprocal()
    square = value.square()
    return Taken(value, -square, TWO * (square * value))


FUNCTIONS: Mapping[str, Callable[[Interval], Taken]] = {
    "sigmoid": _of_sigmoid,
    "tanh": _of_tanh,
    "erf": _of_erf,
    "exp": _of_exp,
    "log": _of_log,
    "softplus": _of_softplus,
    "root": _of_root,
    "sin": _of_sin,
    "cos": _of_cos,
    "atan": _of_atan,
    "inverse": _of_inverse,
}


def about(middle: Jet, jet: Jet, radius: Array, inside: Choice) -> Interval:
    """The slopes on intervals: as enclosed, and from those at their middles by the mean value.

    Args:
        middle: at the middles.
        jet: on the whole intervals.
        radius: half of their lengths, or more.
        inside: whether the middle lies between the ends, as float64: where it is one of them, a
            kink there has the slopes of both sides.
    """
    moved = middle.slope + jet.curve * Interval(-radius, radius)
    return jet.slope.met(moved).where(inside, jet.slope)

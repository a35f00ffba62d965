"""Functions of one variable near infinity, as intervals times weights ``y^k exp(-c y)``.

Intervals alone lose what a product needs: x sigmoid'(x) is the product of something that has no
bound and something near 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lipfast.rules.intervals import WHOLE, Interval
from lipfast.rules.scalar_functions import FUNCTIONS

# Of products of a power and an exponential: those of the C library are far more accurate.
_SLACK = 1.0 + 2.0**-30
# f' is at most A exp(-r |u|^q) in magnitude, and so is f where it goes to 0.
_DECAYS: Mapping[str, tuple[float, float, int]] = {
    "sigmoid": (1.0, 1.0, 1),
    "softplus": (1.0, 1.0, 1),
    "exp": (1.0, 1.0, 1),
    "tanh": (4.0, 2.0, 1),
    "erf": (1.13, 1.0, 2),
}
_VANISH = ("sigmoid", "softplus", "exp")  # towards -infinity


@dataclass(frozen=True)
class Growth:
    """A function that lies in ``ratio y^power exp(-rate y)`` for all y >= start."""

    ratio: Interval
    power: float
    rate: float
    start: float

    def at(self, ratio: Interval, power: float = 0.0, rate: float = 0.0) -> Growth:
        """Another function on the same half-line."""
        return Growth(ratio, power, rate, self.start)

    @property
    def none(self) -> bool:
        """Whether it is 0."""
        return float(self.ratio.low) == float(self.ratio.high) == 0.0

    @property
    def range(self) -> Interval:
        """All values."""
        if self.none or (self.power == self.rate == 0.0):
            return self.ratio
        return self.ratio * _weights(self.power, self.rate, self.start)

    def __neg__(self) -> Growth:
        return self.at(-self.ratio, self.power, self.rate)

    def __add__(self, other: Growth) -> Growth:
        if self.none or other.none:
            return other if self.none else self
        large, small = self, other
        if (small.rate, -small.power) < (large.rate, -large.power):
            large, small = small, large
        weight = _weights(small.power - large.power, small.rate - large.rate, self.start)
        return self.at(large.ratio + small.ratio * weight, large.power, large.rate)

    def __mul__(self, other: Growth) -> Growth:
        if self.none or other.none:
            return self.at(Interval.of(0.0))
        ratio = self.ratio * other.ratio
        power, rate = self.power + other.power, self.rate + other.rate
        # A rounded sum of rates is no weight; less decay is a bound.
        if Fraction(rate) != Fraction(self.rate) + Fraction(other.rate):
            rate = math.nextafter(rate, -math.inf)
            ratio = ratio * Interval.of(0.0, 1.0)
        return self.at(ratio, power, rate)

    def inverse(self) -> Growth:
        """``1 / f``; everything where f may be 0."""
        if float(self.ratio.least) == 0.0:
            return self.at(WHOLE)
        return self.at(self.ratio.reciprocal(), -self.power, -self.rate)

    def larger(self, other: Growth) -> tuple[Growth, bool | None]:
        """The maximum, and whether it is this function (None: it is not known)."""
        difference = (self + -other).range
        if float(difference.low) >= 0.0:
            return self, True
        if float(difference.high) <= 0.0:
            return other, False
        first, second = self.range, other.range
        low, high = np.maximum(first.low, second.low), np.maximum(first.high, second.high)
        return self.at(Interval(low, high)), None

    def then(self, function: str) -> tuple[Growth, Growth]:
        """One of `FUNCTIONS` of this function, and its slope there."""
        if function == "inverse":
            value = self.inverse()
            return value, -(value * value)
        values, slopes, _ = FUNCTIONS[function](self.range)
        value, slope = self.at(values), self.at(slopes)
        if function == "root" and float(self.ratio.low) > 0.0 and self.rate == 0.0:
            value = self.at(FUNCTIONS["root"](self.ratio).value, self.power / 2)
            slope = value.inverse() * self.at(Interval.of(0.5))
        elif float(self.ratio.least) > 0.0 and self.power > 0.0 and self.rate == 0.0:
            return self._towards_infinity(function, value, slope)
        return value, slope

    def _towards_infinity(
        self, function: str, value: Growth, slope: Growth
    ) -> tuple[Growth, Growth]:
        """What is known besides values and slopes where the operand goes to +-infinity."""
        upward = float(self.ratio.low) > 0.0
        decay = self._decay(function)
        if function == "exp" and self.power == 1.0 and float(self.ratio.low) == self.ratio.high:
            value = slope = self.at(Interval.of(1.0), 0.0, -float(self.ratio.low))
        elif function == "log" and upward:
            slope = self.inverse()
        elif function == "atan":
            slope = self.inverse() * self.inverse() * self.at(Interval.of(0.0, 1.0))
        elif not upward and function in _VANISH:
            value = slope = decay
        elif function == "softplus":  # u <= softplus(u) <= u + exp(-u)
            least = float(self.range.low)
            excess = Interval.of(1.0, 1.0 + math.exp(-least) / least * _SLACK + 2.0**-50)
            value = self * self.at(excess)
        elif function in ("sigmoid", "tanh", "erf"):
            slope = decay
        return value, slope

    def _decay(self, function: str) -> Growth:
        """``A exp(-r |u|^q)`` as a bound, where ``|u| >= m y^k``; A alone where q k < 1."""
        size, rate, order = _DECAYS.get(function, (math.inf, 0.0, 1))
        power = self.power * order
        if power < 1.0:
            return self.at(Interval.of(0.0, size))
        # |u|^q >= m^q y^(k q) >= m^q start^(k q - 1) y
        least = _power(float(self.ratio.least), order) * _power(self.start, power - 1.0)
        return self.at(Interval.of(0.0, size), 0.0, min(least * rate / _SLACK, 2.0**1000))


@dataclass(frozen=True)
class Tail:
    """A function on a half-line, with its derivative."""

    value: Growth
    slope: Growth

    def __add__(self, other: Tail) -> Tail:
        return Tail(self.value + other.value, self.slope + other.slope)

    def __neg__(self) -> Tail:
        return Tail(-self.value, -self.slope)

    def __mul__(self, other: Tail) -> Tail:
        slope = self.slope * other.value + self.value * other.slope
        return Tail(self.value * other.value, slope)

    def square(self) -> Tail:
        """The square of the function."""
        return self * self

    def larger(self, other: Tail) -> Tail:
        """The maximum of two functions."""
        value, first = self.value.larger(other.value)
        if first is not None:
            return Tail(value, (self if first else other).slope)
        return Tail(value, value.at(self.slope.range.hull(other.slope.range)))

    def then(self, function: str) -> Tail:
        """One of `FUNCTIONS` of this function."""
        value, slope = self.value.then(function)
        return Tail(value, slope * self.slope)


def _power(base: float, exponent: float) -> float:
    """``b^e`` for b >= 0, at most 2^1000."""
    try:
        return min(float(base**exponent), 2.0**1000)
    except OverflowError:
        return 2.0**1000


def _weights(power: float, rate: float, start: float) -> Interval:
    """All values of ``y^power exp(-rate y)`` for y >= start."""
    if power == rate == 0.0:
        return Interval.of(1.0)
    if rate < 0.0 or (rate == 0.0 and power > 0.0):
        least = _power(start, power) / _SLACK if rate == 0.0 else 0.0
        return Interval.of(least, math.inf)
    peak = start if rate == 0.0 else max(start, power / rate)
    try:
        top = math.exp(power * math.log(peak) - rate * peak)
    except OverflowError:
        top = math.inf
    # The exponent carries an error of a few units of its terms.
    terms = abs(power * math.log(peak)) + rate * peak
    room = 1.0 + terms * 2.0**-48 if terms < 2.0**40 else math.inf
    return Interval.of(0.0, max(top * room * _SLACK, 2.0**-1000))

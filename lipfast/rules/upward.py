"""Non-negative numbers whose every operation is rounded up and cannot overflow.

A product of the norms of many layers leaves the range of float64 (1e27 is ordinary for a
ResNet50 at initialisation), and an overflow is not the same as "unbounded". `Upward` keeps a
float64 mantissa and an integer exponent of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_UNIT = 2.0**-53
_LOG2 = math.log(2.0)
# Beyond this distance the smaller term is far below one ulp of the larger.
ALIGNMENT = 128


@dataclass(frozen=True)
class Upward:
    """The number ``mantissa * 2**exponent``, an upper bound of what was computed.

    ``mantissa`` is 0, inf, or in [1/2, 1). Operations: ``a * b``, ``a + b`` (operands may be
    plain non-negative floats), `square_root`, `maximum`. Each result is at least the real-number
    result of its operands; powers of two and zeros are exact.

    Examples:
        >>> product = Upward.of(1e300) * 1e300
        >>> product.value
        inf
        >>> round(product.log, 3)
        1381.551
        >>> (Upward.of(1.5) * 2.0).value
        3.0
    """

    mantissa: float
    exponent: int = 0
    _many = False  # whether there is one per network

    @staticmethod
    def of(value: float) -> Upward:
        """Convert a non-negative float64, exactly.

        Raises:
            ValueError: `value` is negative or NaN.
        """
        if not value >= 0.0:
            raise ValueError(f"a Lipschitz constant must be a number >= 0, not {value}")
        if math.isinf(value):
            return Upward(math.inf)
        return Upward(*math.frexp(value))

    def __mul__(self, other: Upward | float) -> Upward:
        if not isinstance(other, Upward):
            other = Upward.of(other)
        # A constant branch stays constant, whatever follows: 0 * inf is 0 here.
        if self.mantissa == 0.0 or other.mantissa == 0.0:
            return Upward(0.0)
        product = self.mantissa * other.mantissa
        if self.mantissa != 0.5 and other.mantissa != 0.5:
            product = math.nextafter(product, math.inf)
        return _normalised(product, self.exponent + other.exponent)

    __rmul__ = __mul__

    def __add__(self, other: Upward | float) -> Upward:
        if not isinstance(other, Upward):
            other = Upward.of(other)
        if self.mantissa == 0.0 or other.mantissa == 0.0:
            return other if self.mantissa == 0.0 else self
        if math.isinf(self.mantissa) or math.isinf(other.mantissa):
            return Upward(math.inf)
        large, small = (self, other) if self.exponent >= other.exponent else (other, self)
        shift = min(large.exponent - small.exponent, ALIGNMENT)
        total = large.mantissa + math.ldexp(small.mantissa, -shift)
        return _normalised(math.nextafter(total, math.inf), large.exponent)

    __radd__ = __add__

    def square_root(self) -> Upward:
        """Return the square root, rounded up."""
        if self.mantissa == 0.0 or math.isinf(self.mantissa):
            return self
        odd = self.exponent % 2
        root = math.nextafter(math.sqrt(math.ldexp(self.mantissa, odd)), math.inf)
        return _normalised(root, (self.exponent - odd) // 2)

    def maximum(self, other: Upward) -> Upward:
        """Return the larger of the two, exactly."""
        if other._many:
            return other.maximum(self)
        if self.mantissa == 0.0 or other.mantissa == 0.0:
            return other if self.mantissa == 0.0 else self
        if math.isinf(self.mantissa) or math.isinf(other.mantissa):
            return Upward(math.inf)
        first = (self.exponent, self.mantissa) >= (other.exponent, other.mantissa)
        return self if first else other

    def _root_of_squares(self, parts: Sequence[Upward]) -> Upward:
        """The root of a sum of squares; of a single part that is not zero, that part exactly."""
        nonzero = [part for part in parts if part.mantissa != 0.0]
        return nonzero[0] if len(nonzero) == 1 else self.square_root()

    @property
    def unbounded(self) -> bool:
        """Whether this is a true infinity, not a number too large for float64."""
        return math.isinf(self.mantissa)

    @property
    def value(self) -> float:
        """The number as float64, rounded up; inf when it is too large for float64."""
        try:
            value = math.ldexp(self.mantissa, self.exponent)
        except OverflowError:
            return math.inf
        # ldexp rounds to nearest among the subnormal numbers.
        exact = self.mantissa == 0.0 or math.frexp(value) == (self.mantissa, self.exponent)
        return value if exact or math.isinf(value) else math.nextafter(value, math.inf)

    @property
    def log(self) -> float:
        """The natural logarithm, rounded up; -inf for 0."""
        if self.mantissa == 0.0:
            return -math.inf
        if math.isinf(self.mantissa):
            return math.inf
        fraction, scale = math.log(self.mantissa), self.exponent * _LOG2
        return math.nextafter(fraction + scale + 8 * _UNIT * (abs(fraction) + abs(scale)), math.inf)


def p_norm(parts: Sequence[Upward], norm: float) -> Upward:
    """The p-norm of constants, rounded up: of maps (or radii) that are taken together as one.

    Args:
        parts: at least one.
        norm: p = 1 (their sum), 2 (root of the sum of squares) or inf (the largest).
    """
    total = Upward.of(0.0)
    for part in parts:
        if math.isinf(norm):
            total = total.maximum(part)
        else:
            total = total + (part * part if norm == 2 else part)
    return total._root_of_squares(parts) if norm == 2 else total


def _normalised(mantissa: float, exponent: int) -> Upward:
    if math.isinf(mantissa):
        return Upward(math.inf)
    fraction, shift = math.frexp(mantissa)
    return Upward(fraction, exponent + shift)

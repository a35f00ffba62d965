"""Many `Upward` numbers at once: one per network, in arrays.

A rule that is written for `Upward` numbers works on these as it is, as long as it only multiplies,
adds, takes roots and maxima. What asks for a single number (a comparison, `float`, ``if``) raises
here, and never sees the wrong one: then the rule is asked once per network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lipfast.rules.upward import ALIGNMENT, Upward

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Upwards(Upward):
    """At least two numbers ``mantissa * 2**exponent``, every operation rounded up.

    Each is what the same operation on single `Upward` numbers gives, bit by bit.

    Attributes:
        mantissa: (networks,), entries 0, inf, or in [1/2, 1).
        exponent: (networks,).

    Examples:
        >>> both = Upwards.of([1.5, 1e300]) * Upward.of(2.0)
        >>> both[0].value, (both * both)[1].value
        (3.0, inf)
    """

    mantissa: Any
    exponent: Any
    _many = True

    @staticmethod
    def of(values: Any) -> Upwards:
        """Convert non-negative float64 numbers, exactly.

        Raises:
            ValueError: one is negative or NaN, or there are fewer than two.
        """
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.ndim != 1 or len(numbers) < 2:
            raise ValueError("expected at least two numbers")
        if not bool((numbers >= 0.0).all()):
            raise ValueError("a Lipschitz constant must be a number >= 0")
        return _all_normalised(numbers, np.zeros(len(numbers), dtype=np.int64))

    @staticmethod
    def joined(numbers: Sequence[Upward]) -> Upwards:
        """One for each network."""
        mantissas = np.array([number.mantissa for number in numbers])
        return Upwards(mantissas, np.array([number.exponent for number in numbers], dtype=np.int64))

    @staticmethod
    def alike(number: Upward, networks: int) -> Upwards:
        """The number itself, or a single one for all networks."""
        if isinstance(number, Upwards):
            return number
        return Upwards(
            np.full(networks, number.mantissa), np.full(networks, number.exponent, dtype=np.int64)
        )

    def __getitem__(self, network: int) -> Upward:
        return Upward(float(self.mantissa[network]), int(self.exponent[network]))

    def __len__(self) -> int:
        return len(self.mantissa)

    def __mul__(self, other: Upward | float) -> Upwards:
        other = other if isinstance(other, Upward) else Upward.of(other)
        with np.errstate(invalid="ignore"):
            product = self.mantissa * other.mantissa
        inexact = (self.mantissa != 0.5) & (other.mantissa != 0.5)
        product = np.where(inexact, np.nextafter(product, np.inf), product)
        zero = (self.mantissa == 0.0) | (other.mantissa == 0.0)
        return _all_normalised(np.where(zero, 0.0, product), self.exponent + other.exponent)

    __rmul__ = __mul__

    def __add__(self, other: Upward | float) -> Upwards:
        other = other if isinstance(other, Upward) else Upward.of(other)
        first = self.exponent >= other.exponent
        large = np.where(first, self.mantissa, other.mantissa)
        small = np.where(first, other.mantissa, self.mantissa)
        exponent = np.where(first, self.exponent, other.exponent)
        shift = np.minimum(exponent - np.where(first, other.exponent, self.exponent), ALIGNMENT)
        total = np.nextafter(large + np.ldexp(small, -shift), np.inf)
        found = _all_normalised(total, exponent)
        return found._or(self.mantissa == 0.0, other)._or(other.mantissa == 0.0, self)

    __radd__ = __add__

    def _or(self, chosen: Any, other: Upward) -> Upwards:
        """The other numbers where they are chosen."""
        return Upwards(
            np.where(chosen, other.mantissa, self.mantissa),
            np.where(chosen, other.exponent, self.exponent),
        )

    def square_root(self) -> Upwards:
        """Return the square roots, rounded up."""
        odd = self.exponent % 2
        root = np.nextafter(np.sqrt(np.ldexp(self.mantissa, odd)), np.inf)
        fixed = (self.mantissa == 0.0) | np.isinf(self.mantissa)
        return _all_normalised(root, (self.exponent - odd) // 2)._or(fixed, self)

    def maximum(self, other: Upward) -> Upwards:
        """Return the larger of each two, exactly."""
        higher = (self.exponent > other.exponent) | (
            (self.exponent == other.exponent) & (self.mantissa >= other.mantissa)
        )
        # Exponents of 0 and inf say nothing.
        own = np.where(self.mantissa == 0.0, other.mantissa == 0.0, higher)
        own = (own | np.isinf(self.mantissa) | (other.mantissa == 0.0)) & ~np.isinf(other.mantissa)
        return self._or(~own, other)

    def _root_of_squares(self, parts: Sequence[Upward]) -> Upwards:
        """See `Upward`: a part that is alone, exactly, else the root."""
        nonzero = sum(np.not_equal(part.mantissa, 0.0).astype(np.int64) for part in parts)
        found = self.square_root()
        for part in parts:
            found = found._or((nonzero == 1) & np.not_equal(part.mantissa, 0.0), part)
        return found

    @property
    def unbounded(self) -> Any:
        """Whether each is a true infinity."""
        return np.isinf(self.mantissa)

    @property
    def value(self) -> Any:
        """The numbers as float64, rounded up; inf where one is too large for float64."""
        with np.errstate(over="ignore", under="ignore"):
            value = np.ldexp(self.mantissa, np.clip(self.exponent, -5000, 5000))
            above = np.nextafter(value, np.inf)
        mantissa, exponent = np.frexp(value)
        exact = (self.mantissa == 0.0) | np.isinf(value)
        exact |= (mantissa == self.mantissa) & (exponent == self.exponent)
        return np.where(exact, value, above)

    @property
    def log(self) -> Any:
        """The natural logarithms, rounded up."""
        return np.array([self[network].log for network in range(len(self))])

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("numbers of many networks are not compared")

    __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> NoReturn:
        raise TypeError("numbers of many networks are neither true nor false")


def _all_normalised(mantissa: Floats, exponent: Integers) -> Upwards:
    fraction, shift = np.frexp(mantissa)
    fixed = (fraction == 0.0) | np.isinf(mantissa)
    return Upwards(fraction, np.where(fixed, 0, exponent + shift))

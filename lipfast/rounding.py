"""The rounding-error analysis in IEEE float64: its constants, and the room that it asks for.

`lipfast.reference` has constants of its own on purpose: a mistake here must not hide itself.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

from torch import Tensor

UNIT_ROUNDOFF = u = 2.0**-53
# Absolute room for roundings that underflow: at most 2^-1075 each, and far fewer than 2^75 of them
# in one element of a result.
UNDERFLOW = 2.0**-1000
# The same for one operand before it is multiplied by a weight: still small beside 2^-53 when the
# weight is the largest float64.
SMALLEST = 2.0**-1074
# Relative room for the roundings of sums of up to 2^30 numbers, taken for all of them alike.
WIDE = 1.0 + 2.0**-20

_Scaled = TypeVar("_Scaled", bound="_Scalable")


class _Scalable(Protocol):
    def __mul__(self: _Scaled, factor: float, /) -> _Scaled: ...


def gamma(count: int) -> float:
    """``k u / (1 - k u)``, rounded up: relative error of k roundings (Higham, 2002, sec. 3.1)."""
    product = count * UNIT_ROUNDOFF
    return math.nextafter(product / (1.0 - product) * (1.0 + 4 * UNIT_ROUNDOFF), math.inf)


def wide_gamma(count: int) -> float:
    """``k u / (1 - k u)`` with the room `WIDE`: for its own rounding, and a sum it multiplies."""
    return count * UNIT_ROUNDOFF / (1.0 - count * UNIT_ROUNDOFF) * WIDE


def widened(x: _Scaled, roundings: int) -> _Scaled:
    r"""At least the number >= 0 that x was computed for, with at most k > 0 roundings upon another.

    ``x (1 + 2 gamma_k)`` for an x made of sums, products, quotients and roots of numbers >= 0, for
    k < 2^50. Proof: every rounding is a factor of at least 1 - u, so the number is at most
    $x / (1 - u)^k \le x / (1 - k u)$. 1 + 2 k u is a float64, so that the computed factor is at
    least that, and the product with x at least $x (1 + 2 k u)(1 - u)$. With s = k u < 1/8 this
    times 1 - s is $x (1 + s - 2 s^2)(1 - u)$, at least x if $s (1 - 2 s) \ge u (1 + s - 2 s^2)$:
    so it is for k > 1. For k = 1 the product is the float64 above x at least, and the number is
    half a step above x at most. Up to k = 2^25 the factor is 1 + 2 k u itself.

    Where x may be denormal, roundings are no factors: add `UNDERFLOW`.

    Example:
        >>> widened(1.0, 4) == 1.0 + 8 * UNIT_ROUNDOFF
        True
    """
    return x * (1.0 + 2.0 * gamma(roundings))


def narrowed(x: _Scaled, roundings: int) -> _Scaled:
    r"""At most the number >= 0 that x was computed for, with fewer than k roundings upon another.

    ``x (1 - gamma_k)`` for an x made of sums, products and roots of numbers >= 0, or one quotient
    or difference of exact ones, for k < 2^50. Proof: every rounding is a factor of at most 1 + u,
    so the number is at least $x / (1 + u)^{k - 1}$. 1 - k u is a float64 and $\gamma_k \ge k u$, so
    that the computed factor is at most that, and the product with x at most
    $x (1 - k u)(1 + u)$; and $(1 + u)^k \le e^{k u} \le 1 / (1 - k u)$.

    Where the result may be denormal, roundings are no factors.

    Example:
        >>> narrowed(1.0, 4) == 1.0 - 4 * UNIT_ROUNDOFF
        True
    """
    return x * (1.0 - gamma(roundings))


def magnitude(x: Tensor, error: Tensor | None, relative: float) -> Tensor:
    """``|x| + e / relative``: what a linear map of magnitudes turns into its error over `relative`.

    In ``relative |x| + e`` the first term may underflow and then meet a huge weight; and denormal
    operands make a matrix product many times slower.
    """
    return x.abs() if error is None else x.abs() + error / relative

"""Constants of the rounding-error analysis in float64."""

from __future__ import annotations

import math

from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
# Absolute room for roundings that underflow: at most 2^-1075 each, and far fewer than 2^75 of them
# in one element of a result.
UNDERFLOW = 2.0**-1000
# The same for one operand before it is multiplied by a weight: still small beside 2^-53 when the
# weight is the largest float64.
SMALLEST = 2.0**-1074


def gamma(count: int) -> float:
    """``k u / (1 - k u)``, rounded up: relative error of k roundings (Higham, 2002, sec. 3.1)."""
    product = count * UNIT_ROUNDOFF
    return math.nextafter(product / (1.0 - product) * (1.0 + 4 * UNIT_ROUNDOFF), math.inf)


def magnitude(x: Tensor, error: Tensor | None, relative: float) -> Tensor:
    """``|x| + e / relative``: what a linear map of magnitudes turns into its error over `relative`.

    In ``relative |x| + e`` the first term may underflow and then meet a huge weight; and denormal
    operands make a matrix product many times slower.
    """
    return x.abs() if error is None else x.abs() + error / relative

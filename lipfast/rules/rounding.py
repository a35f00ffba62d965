"""Constants of the rounding-error analysis in float64."""

from __future__ import annotations

import math

UNIT_ROUNDOFF = 2.0**-53
# Absolute room for products that underflow (even with denormals flushed to zero): at most
# 2^-1022 each, and fewer than 2^22 of them in one inner product.
UNDERFLOW = 2.0**-1000


def gamma(count: int) -> float:
    """``k u / (1 - k u)``, rounded up: relative error of k roundings (Higham, 2002, sec. 3.1)."""
    product = count * UNIT_ROUNDOFF
    return math.nextafter(product / (1.0 - product) * (1.0 + 4 * UNIT_ROUNDOFF), math.inf)

"""Where a value lies between the lower and the upper bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def relative_position(value: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> NDArray[np.float64]:
    """``log(value / lower) / log(upper / lower)``: 0 at the lower bound, 1 at the upper bound.

    How Khromov and Singh (section 3.1) judge the fidelity of the lower bound: the bound on a larger
    set of points lies near C_lower or near C_upper.

    Args:
        value: positive, any shape.
        lower: positive, broadcastable to it.
        upper: the same.

    Returns:
        The position, NaN where both bounds are equal.

    Example:
        >>> float(relative_position(10.0, 1.0, 1000.0).round(6))
        0.333333
    """
    low, high = np.log(np.asarray(lower, np.float64)), np.log(np.asarray(upper, np.float64))
    span = np.asarray(high - low)
    above = np.log(np.asarray(value, np.float64)) - low
    position: NDArray[np.float64] = np.full(np.broadcast(above, span).shape, np.nan)
    np.divide(above, span, out=position, where=span != 0)
    return position

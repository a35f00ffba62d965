"""Power laws: straight lines in log-log scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lipfast.errors import ArgumentError


@dataclass(frozen=True)
class PowerLaw:
    """The fit ``y = scale x^slope`` over a window of x.

    Attributes:
        slope: the exponent.
        scale: y at x = 1.
        r_squared: of the regression in log-log scale; 1 where y is constant and fitted exactly.
        window: smallest and largest x that entered.
        points: number of points that entered.
    """

    slope: float
    scale: float
    r_squared: float
    window: tuple[float, float]
    points: int

    def at(self, x: ArrayLike) -> NDArray[np.float64]:
        """Evaluate the fit."""
        values: NDArray[np.float64] = self.scale * np.asarray(x, dtype=np.float64) ** self.slope
        return values


def fit_power_law(
    x: ArrayLike, y: ArrayLike, *, window: tuple[float, float] | None = None
) -> PowerLaw:
    """Least squares of ``log y = slope log x + log scale``, and its coefficient of determination.

    ``R^2 = 1 - sum_i (log y_i - fit_i)^2 / sum_i (log y_i - mean)^2``. Khromov and Singh
    (appendix 2.6.8 and table 8) fit the bounds against the epoch this way, from the epoch on at
    which training is stable.

    Args:
        x: (n,).
        y: (n,). Points where x or y is not positive and finite have no logarithm and are left out.
        window: smallest and largest x that enter, both included; all by default.

    Returns:
        The fit.

    Raises:
        ArgumentError: shapes differ, or fewer than two different x are left.

    Example:
        >>> fit = fit_power_law([1, 2, 4, 8], [3, 6, 12, 24])
        >>> round(fit.slope, 6), round(fit.scale, 6), round(fit.r_squared, 6)
        (1.0, 3.0, 1.0)
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ArgumentError(f"x and y must have one shape (n,), got {xs.shape} and {ys.shape}")
    low, high = window if window is not None else (0.0, np.inf)
    usable = np.isfinite(xs) & np.isfinite(ys) & (xs > 0) & (ys > 0) & (low <= xs) & (xs <= high)
    xs, ys = xs[usable], ys[usable]
    if len(np.unique(xs)) < 2:
        raise ArgumentError(
            "a power law needs two different positive x in the window with positive y, "
            f"got {len(np.unique(xs))}"
        )
    u, v = np.log(xs), np.log(ys)
    du, dv = u - u.mean(), v - v.mean()
    slope = float(du @ dv / (du @ du))
    residual = dv - slope * du
    # Below the rounding of the logarithms, y is constant and the fit is exact.
    total = float(dv @ dv)
    exact = total <= len(v) * (1e-14 * max(1.0, float(np.abs(v).max()))) ** 2
    return PowerLaw(
        slope=slope,
        scale=float(np.exp(v.mean() - slope * u.mean())),
        r_squared=1.0 if exact else 1 - float(residual @ residual) / total,
        window=(float(xs.min()), float(xs.max())),
        points=len(xs),
    )

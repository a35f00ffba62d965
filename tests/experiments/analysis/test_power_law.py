from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.power_law import fit_power_law
from lipfast.errors import ArgumentError


@pytest.mark.parametrize("slope", [-2.52, 0.0, 0.46, 7.32])
def test_an_exact_power_law_is_recovered(slope: float) -> None:
    x = np.geomspace(1, 1e5, 30)
    fit = fit_power_law(x, 3.7 * x**slope)
    assert fit.slope == pytest.approx(slope, abs=1e-12)
    assert fit.scale == pytest.approx(3.7)
    assert fit.r_squared == pytest.approx(1)
    np.testing.assert_allclose(fit.at(x), 3.7 * x**slope)


def test_only_the_window_enters() -> None:
    x = np.array([1.0, 2, 4, 8, 16])
    y = np.array([1.0, 1, 1, 2, 4])
    fit = fit_power_law(x, y, window=(4, 16))
    assert (fit.points, fit.window) == (3, (4, 16))
    assert fit.slope == pytest.approx(1)
    assert fit_power_law(x, y).slope < 0.6


def test_r_squared_of_known_noise() -> None:
    # Residuals orthogonal to log x: the slope stays, R^2 = 1 - 4 d^2 / (4 d^2 + s^2 sum u^2).
    u = np.array([-1.0, -0.5, 0.5, 1.0])
    d = np.array([0.1, -0.2, 0.2, -0.1])
    d -= (d @ u) / (u @ u) * u
    d -= d.mean()
    fit = fit_power_law(np.exp(u), np.exp(0.5 * u + d))
    assert fit.slope == pytest.approx(0.5)
    assert fit.r_squared == pytest.approx(1 - (d @ d) / (d @ d + 0.25 * (u @ u)))


def test_points_without_logarithm_are_left_out_and_too_few_refused() -> None:
    fit = fit_power_law([0, 1, 2, 4, 8], [5, 1, 2, np.nan, 8])
    assert (fit.points, fit.slope) == (3, pytest.approx(1))
    with pytest.raises(ArgumentError, match="two different positive x"):
        fit_power_law([1, 1, 2], [1, 2, 0])
    with pytest.raises(ArgumentError, match="one shape"):
        fit_power_law([1, 2, 3], [1, 2])

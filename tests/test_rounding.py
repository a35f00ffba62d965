"""Tests of what error bounds are made of."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lipfast.rounding import UNIT_ROUNDOFF, gamma, magnitude, widened

SMALLEST_NORMAL = 2.0**-1022


@pytest.mark.parametrize("terms", [1, 42, 4096])
def test_magnitude_times_the_relative_error_covers_both_terms(terms):
    relative = gamma(terms + 2)
    generator = torch.Generator().manual_seed(terms)
    powers = torch.randint(-1070, 900, (200,), generator=generator).double()
    x = torch.randn(200, generator=generator, dtype=torch.float64) * 2.0**powers
    error = torch.rand(200, generator=generator, dtype=torch.float64) * 2.0 ** (powers - 40)
    error = error.clamp_min(2.0**-1000)
    found = magnitude(x, error, relative)
    slack = 1 + 4 * Fraction(UNIT_ROUNDOFF)  # far less than what every caller widens by
    for size, value, bound in zip(found.tolist(), x.tolist(), error.tolist(), strict=True):
        wanted = Fraction(relative) * abs(Fraction(value)) + Fraction(bound)
        assert Fraction(relative) * Fraction(size) * slack >= wanted
        assert Fraction(relative) * Fraction(size) <= wanted * slack


@pytest.mark.parametrize("error", [None, torch.tensor([0.0, 2.0**-1000, 0.0])])
def test_magnitude_makes_no_denormal_numbers(error):
    # They would make the products that follow many times slower.
    x = torch.tensor([0.0, 0.0, -3.0], dtype=torch.float64)
    found = magnitude(x, None if error is None else error.double(), gamma(258))
    assert bool(((found == 0) | (found >= SMALLEST_NORMAL)).all())
    assert found[2] == 3.0


@pytest.mark.parametrize("roundings", [1, 2, 3, 17, 1000, 2**25])
def test_widened_covers_the_roundings(roundings):
    worst = (1 - Fraction(UNIT_ROUNDOFF)) ** -min(roundings, 1000)
    if roundings > 1000:
        worst = 1 / (1 - roundings * Fraction(UNIT_ROUNDOFF))
    for x in (1.0, 1.0 + 2.0**-52, 1.1, 1.9999999999999998, 2.0**-1000, 3e300):
        assert Fraction(widened(x, roundings)) >= Fraction(x) * worst
    assert widened(1.0, roundings) == 1.0 + 2 * roundings * UNIT_ROUNDOFF

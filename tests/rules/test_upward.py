"""Numbers rounded up, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipfast.rules.upward import Upward

numbers = st.floats(min_value=0.0, allow_infinity=False, allow_nan=False, max_value=1e300)


def exact(value: Upward) -> Fraction:
    return Fraction(value.mantissa) * Fraction(2) ** value.exponent


@settings(max_examples=300, deadline=None)
@given(numbers, numbers)
def test_sums_and_products_are_never_below_the_exact_ones(a: float, b: float) -> None:
    first, second = Upward.of(a), Upward.of(b)
    product, total = exact(first * second), exact(first + second)
    assert product >= Fraction(a) * Fraction(b)
    assert total >= Fraction(a) + Fraction(b)
    assert product <= Fraction(a) * Fraction(b) * (1 + Fraction(2) ** -50)
    assert total <= (Fraction(a) + Fraction(b)) * (1 + Fraction(2) ** -50)
    assert exact(first.maximum(second)) == max(Fraction(a), Fraction(b))


@settings(max_examples=200, deadline=None)
@given(numbers)
def test_square_root_and_value(a: float) -> None:
    root = exact(Upward.of(a).square_root())
    assert root * root >= Fraction(a)
    assert root * root <= Fraction(a) * (1 + Fraction(2) ** -48)
    assert Upward.of(a).value == a


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=0.5, max_value=0.999), st.integers(-5000, 5000))
def test_log_is_rounded_up(mantissa: float, exponent: int) -> None:
    with mpmath.workdps(40):
        true = mpmath.log(mpmath.mpf(mantissa)) + exponent * mpmath.log(2)
        log = Upward(mantissa, exponent).log
        assert mpmath.mpf(log) >= true
        assert mpmath.mpf(log) - true <= 1e-14 * (1 + abs(true))


def test_products_beyond_float64_keep_their_logarithm() -> None:
    product = Upward.of(1.0)
    for _ in range(1000):
        product = product * 1e200
    assert product.value == math.inf
    assert not product.unbounded
    assert product.log == pytest.approx(200_000 * math.log(10))


def test_products_below_float64_round_up_to_the_smallest_number() -> None:
    product = Upward.of(1e-300) * 1e-300
    assert product.value == 5e-324
    assert product.log == pytest.approx(-600 * math.log(10))


def test_zero_infinity_and_powers_of_two() -> None:
    infinite, zero = Upward.of(math.inf), Upward.of(0.0)
    assert (infinite * 2.0).unbounded
    assert (infinite + 1.0).unbounded
    assert (zero * infinite).value == 0.0
    assert zero.log == -math.inf
    assert infinite.maximum(zero).unbounded
    assert infinite.square_root().unbounded
    assert (Upward.of(0.1) * 2.0).value == 0.2
    assert (2.0 * Upward.of(0.1)).value == 0.2


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_not_a_constant(bad: float) -> None:
    with pytest.raises(ValueError, match="must be a number >= 0"):
        Upward.of(bad)

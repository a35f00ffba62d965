"""Arithmetic of many networks' numbers is that of single ones, bit by bit."""

from __future__ import annotations

import math
import operator
import sys

import numpy as np
import pytest

from lipfast.rules.upward import Upward, p_norm
from lipfast.rules.upwards import Upwards

_RNG = np.random.default_rng(0)
_SPECIAL = [0.0, math.inf, 0.5, 1.0, 2.0, 2.0**-1074, 2.0**1023, 1 - 2.0**-53, 3e-310]
_SPECIAL += [1.7e308, sys.float_info.max]
SINGLE = [Upward.of(value) for value in _SPECIAL] + [
    Upward(float(mantissa), int(exponent))
    for mantissa, exponent in zip(
        _RNG.uniform(0.5, 1.0, 60), _RNG.integers(-3000, 3000, 60), strict=True
    )
]
FIRST = [a for a in SINGLE for _ in SINGLE]
SECOND = [b for _ in SINGLE for b in SINGLE]


def same(found: Upwards, expected: list[Upward]) -> None:
    assert [found[index] for index in range(len(found))] == expected


def maximum(a: Upward, b: Upward) -> Upward:
    return a.maximum(b)


@pytest.mark.parametrize("apply", [operator.mul, operator.add, maximum])
def test_of_two(apply) -> None:
    many = (Upwards.joined(FIRST), Upwards.joined(SECOND))
    same(apply(*many), [apply(a, b) for a, b in zip(FIRST, SECOND, strict=True)])
    one = Upward.of(0.3)
    same(apply(many[0], one), [apply(a, one) for a in FIRST])
    same(apply(one, many[0]), [apply(one, a) for a in FIRST])
    if apply is not maximum:
        same(apply(many[0], 0.7), [apply(a, 0.7) for a in FIRST])


def test_of_one() -> None:
    many = Upwards.joined(SINGLE)
    same(many.square_root(), [a.square_root() for a in SINGLE])
    for name in ("value", "log", "unbounded"):
        assert getattr(many, name).tolist() == [getattr(a, name) for a in SINGLE]
    values = [a.value for a in SINGLE]
    same(Upwards.of(values), [Upward.of(value) for value in values])
    same(Upwards.alike(SINGLE[3], 4), [SINGLE[3]] * 4)
    assert Upwards.alike(many, 4) is many


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_p_norms(norm: float) -> None:
    parts = [FIRST, SECOND, [SINGLE[0]] * len(FIRST)]
    found = p_norm([Upwards.joined(part) for part in parts], norm)
    assert isinstance(found, Upwards)
    same(found, [p_norm(some, norm) for some in zip(*parts, strict=True)])
    for own in ([0.0, 2.5], [2.5, 0.0], [2.5, math.inf]):
        first, last = map(Upward.of, own)
        found = p_norm([first, Upwards.joined(FIRST), last], norm)
        assert isinstance(found, Upwards)
        same(found, [p_norm([first, a, last], norm) for a in FIRST])


def test_what_asks_for_one_number_raises() -> None:
    many, one = Upwards.of([1.0, 2.0]), Upward.of(1.0)
    for ask in (
        lambda: many == one,
        lambda: one == many,
        lambda: one != many,
        lambda: bool(many),
        lambda: float(many.value),
        lambda: many.value or 0.0,
        lambda: math.isinf(many.mantissa),
        lambda: min(many, one, key=lambda number: number.log),
        lambda: Upward.of(many),
        lambda: Upward.of(many.value),
        lambda: max(many, one),
        lambda: 1.0 if many.unbounded else 2.0,
        lambda: hash(many),
    ):
        with pytest.raises((TypeError, ValueError)):
            ask()
    with pytest.raises(ValueError, match="two numbers"):
        Upwards.of([1.0])
    with pytest.raises(ValueError, match=">= 0"):
        Upwards.of([1.0, math.nan])

"""Rounding is told from other differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lipfast.plan.gaps import (
    Roundings,
    are_alike,
    beyond_half_of_the_digits,
    beyond_rounding,
    gaps_between,
)
from tests.support.jacobian_cases import samples


def test_what_is_not_finite_in_both_is_alike() -> None:
    first = torch.tensor([[1.0, math.nan, math.inf], [1.0, 2.0, math.inf]])
    second = torch.tensor([[1.5, math.nan, math.inf], [1.0, 2.0, -math.inf]])
    gaps, sizes = gaps_between(first, second)
    assert gaps.tolist() == [0.5, math.inf]
    assert sizes.tolist() == [1.5, 2.0]


@pytest.mark.parametrize("ulps", [0, 3, 100])
def test_units_in_the_last_place(ulps: int) -> None:
    ones = torch.ones(2, 3, dtype=torch.float64)
    gaps = gaps_between(ones, ones * (1 + ulps * torch.finfo(torch.float32).eps))
    assert are_alike(gaps, torch.float32) is (ulps < 8)
    assert are_alike(gaps, torch.float64) is (ulps == 0)
    assert beyond_half_of_the_digits(gaps, torch.finfo(torch.float32).eps) is None


def test_rounding_shrinks_with_the_precision_and_a_difference_does_not() -> None:
    ones = torch.ones(1, 1, dtype=torch.float64)
    single = gaps_between(ones, ones + 1e-4)
    assert beyond_rounding(single, gaps_between(ones, ones + 1e-12)) is None
    assert beyond_rounding(single, gaps_between(ones, ones + 1e-4)) == pytest.approx(1e-4)
    assert beyond_half_of_the_digits(single, 1e-6) is None
    assert beyond_half_of_the_digits(single, 1e-10) == pytest.approx(1e-4)


def test_the_shortest_numbers_and_the_largest() -> None:
    x = samples(3, 6).double()
    with Roundings(torch.float64, sizes=True) as none:
        torch.relu(300 * torch.ones(2, dtype=torch.float64)) + torch.tensor(-1e9)
    assert none.eps == torch.finfo(torch.float64).eps
    assert none.largest == 300
    for shorter in (torch.float32, torch.float16, torch.bfloat16):
        with Roundings(torch.float64) as found:
            x.to(shorter).double()
        assert found.eps == torch.finfo(shorter).eps
    with Roundings(torch.float32) as found, torch.autocast("cpu", torch.bfloat16):
        nn.functional.linear(x.float(), torch.ones(2, 6))
    assert found.eps == torch.finfo(torch.bfloat16).eps


def test_a_row_without_a_difference_in_float32_has_room_for_those_of_others() -> None:
    double = torch.full((2,), 7e-12, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    single = torch.tensor([0.0, 1e-2]), torch.ones(2)
    assert beyond_rounding(single, double) is None
    assert beyond_rounding((0 * single[0], single[1]), double) == pytest.approx(7e-12)


def test_tables_that_are_made_in_short_numbers() -> None:
    for tables, eps in ((False, torch.float64), (True, torch.float32)):
        with Roundings(torch.float64, tables=tables) as found:
            torch.zeros(3).double() + torch.arange(3).float().sin().double()
        assert found.eps == torch.finfo(eps).eps

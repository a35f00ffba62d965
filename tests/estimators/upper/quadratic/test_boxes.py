"""Constraints on slopes: true at both ends in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lipfast.estimators.upper.quadratic.boxes import boxes_of


def _excess(lower: float, upper: float) -> list[Fraction]:
    """The parabola at both ends, exactly; and that p is at most m^2."""
    ends = (torch.tensor([value], dtype=torch.float64) for value in (lower, upper))
    boxes = boxes_of(*ends)
    m, p = Fraction(boxes.means.item()), Fraction(boxes.products.item())
    return [Fraction(end) ** 2 - 2 * m * Fraction(end) + p for end in (lower, upper)] + [p - m * m]


def _random_boxes(count: int) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    scales = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    ends *= 10.0 ** (4 * scales - 2)
    ends[::3] = ends[::3, :1] * (1 + 1e-15 * ends[::3] / ends[::3].abs().amax(1, keepdim=True))
    return [(min(pair), max(pair)) for pair in ends.tolist()]


def test_no_slope_of_a_range_violates_its_constraint() -> None:
    for lower, upper in _random_boxes(20_000):
        assert max(_excess(lower, upper)) <= 0, (lower, upper)


@pytest.mark.parametrize(
    "box",
    [
        (-1e-170, 1e-160),
        (-5e-324, 5e-324),
        (0.0, 5e-324),
        (0.0, 1.5e-323),
        (-5e-324, 1.0),
        (1e-320, 3e-320),
        (-1e150, 1e-150),
        (-1e150, 1e150),
        (3.0, 3.0),
        (0.0, 0.0),
        (0.1, 0.1),
        (-0.11252612238946256, 1.0884981612517279),
    ],
)
def test_underflow_and_ends_that_meet(box: tuple[float, float]) -> None:
    assert max(_excess(*box)) <= 0


@pytest.mark.parametrize(
    ("lower", "upper", "mean"), [(0.0, 1.0, 0.5), (0.0, 0.25, 0.125), (-0.5, 0.0, -0.25)]
)
def test_nothing_is_given_away_where_an_end_is_zero(
    lower: float, upper: float, mean: float
) -> None:
    found = boxes_of(*(torch.tensor([x], dtype=torch.float64) for x in (lower, upper)))
    assert (found.means.item(), found.products.item()) == (mean, 0.0)


def test_little_is_given_away_elsewhere() -> None:
    for lower, upper in _random_boxes(2_000):
        size = Fraction(max(abs(lower), abs(upper)))
        assert min(_excess(lower, upper)[:2]) >= -(Fraction(2) ** -48) * size * size

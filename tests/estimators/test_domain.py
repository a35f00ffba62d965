"""Points of a secant are in the domain, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Ball, Box

GENERATOR = torch.Generator().manual_seed(0)


def squared_distance(point: Tensor, centre: Tensor) -> Fraction:
    pairs = zip(point.flatten().tolist(), centre.flatten().tolist(), strict=True)
    return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), Fraction(0))


@pytest.mark.parametrize(
    ("radius", "size"),
    [
        *[(1e-16, 0.5), (3e-14, 255.0), (2e-12, 1e4), (1e-8, 1e6), (1e-8, 1e8), (1.0, 1.0)],
        *[(1e-3, 0.0), (1e150, 1e160), (1e-300, 1e-290), (0.0, 3.0)],
    ],
)
@pytest.mark.parametrize("step", [1e-9, 1.0, 1e9])
def test_points_moved_into_a_ball_are_in_it(radius: float, size: float, step: float) -> None:
    centre = size * torch.rand(3, 4, dtype=torch.float64, generator=GENERATOR)
    offsets = torch.randn(2, 20, 3, 4, dtype=torch.float64, generator=GENERATOR)
    points = centre + offsets * step * max(radius, 1e-300)
    moved = Ball(radius, centre).project(points)
    assert moved.shape == points.shape
    limit = Fraction(radius) ** 2
    assert all(squared_distance(point, centre) <= limit for point in moved.flatten(0, 1))


def test_a_ball_keeps_what_is_inside_and_reaches_its_border() -> None:
    centre = torch.rand(5, dtype=torch.float64, generator=GENERATOR)
    points = centre + torch.randn(1, 30, 5, dtype=torch.float64, generator=GENERATOR)
    moved = Ball(1.0, centre).project(points)
    inside = (points - centre).norm(dim=2) < 1 - 1e-8
    torch.testing.assert_close(moved[inside], points[inside], rtol=1e-15, atol=1e-15)
    border = (moved[~inside] - centre).norm(dim=1)
    assert bool((border > 1 - 1e-8).all())


def test_no_secant_from_beyond_a_ball() -> None:
    """Inside of the ball the function is 0, and a rounding away from it is not."""
    centre, radius = 1e8, 1e-8
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU()).double()
    for layer, bias in ((model[0], -centre), (model[1], -1.2 * radius)):
        layer.weight.data.fill_(1.0)
        layer.bias.data.fill_(bias)
    x = torch.tensor([[centre]], dtype=torch.float64)
    assert lipfast.bounds(model, x, domain=Ball(radius, centre)).lower.value == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("radius", "size"), [(1.0, 0.5), (0.3, 20.0), (1e-3, 100.0), (1e4, 0.0)])
def test_points_of_a_search_are_in_the_ball(radius: float, size: float, dtype: torch.dtype) -> None:
    centre = size * torch.rand(3, 4, dtype=torch.float64, generator=GENERATOR)
    offsets = torch.randn(1, 40, 3, 4, dtype=torch.float64, generator=GENERATOR)
    points = (centre + 2 * offsets * radius).to(dtype)
    ball = Ball(radius, centre)
    moved = ball.project(points)
    assert moved.dtype == dtype
    limit = Fraction(radius) ** 2
    assert all(squared_distance(point, centre) <= limit for point in moved.flatten(0, 1))
    assert bool(ball.contains(moved[0]).all())
    assert not bool(ball.contains(points[0]).all())


def test_samples_inside() -> None:
    points = torch.tensor([[0.1, 0.0], [0.0, 0.2], [-0.3, 0.0]])
    assert Box(-0.1, 0.1).contains(points).tolist() == [True, False, False]
    assert Ball(0.2).contains(points).tolist() == [True, True, False]
    with pytest.raises(lipfast.LipfastError, match="do not fit"):
        Box(torch.zeros(3), torch.ones(3)).contains(points)
    with pytest.raises(lipfast.LipfastError, match="does not fit"):
        Ball(1.0, torch.zeros(3)).contains(points)


def test_several_inputs_flattened() -> None:
    shapes = [(2, 2), (3,)]
    box = Box(torch.tensor(-1.0), 2.0).flattened(shapes)
    assert torch.equal(box.middle((7,)), torch.full((7,), 0.5, dtype=torch.float64))
    ball = Ball(3.0, 1.0).flattened(shapes)
    assert torch.equal(ball.middle((7,)), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Box("a", 1),  # type: ignore[arg-type]
        lambda: Box(None, 1),  # type: ignore[arg-type]
        lambda: Box(0, 1j),  # type: ignore[arg-type]
        lambda: Box(torch.zeros(3), torch.ones(4)),
        lambda: Box(torch.zeros(4, device="meta"), 1),
        lambda: Ball("a"),  # type: ignore[arg-type]
        lambda: Ball(None),  # type: ignore[arg-type]
        lambda: Ball(torch.ones(2)),  # type: ignore[arg-type]
        lambda: Ball(1, "a"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_domain_is_refused_at_once(make: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError):
        make()

"""Slopes and lines on ranges hold in many digits, and are hardly wider than they must be."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp
from torch import nn

from lipfast.estimators.plan import Plan
from lipfast.plan.compositions import join_compositions
from lipfast.rules.intervals import Interval
from lipfast.rules.on_ranges import OnRanges, UnitFunctions, of_slopes_alone, unit_functions
from lipfast.rules.registry import Call
from lipfast.rules.upward import Upward
from tests.rules.test_slopes import CASES, DIGITS, call_of

LINEAR = {"neg", *(name for name in CASES if "number" in name)}
KINKS = (0.0, 0.25, 0.3, -0.3, 0.5, -0.5, 2.0, 3.0, -3.0, 6.0)


def functions_of(module: nn.Module) -> UnitFunctions:
    found = unit_functions(call_of(module, (1,)), None)
    assert found is not None
    return found


def ranges() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random ones, of all sizes; points; and such that end at kinks or around them."""
    generator = np.random.default_rng(0)
    middle, share = 3 * generator.standard_normal(12), generator.uniform(size=12)
    width = 10.0 ** generator.uniform(-4, 1.3, 12)
    low, high = middle - width * share, middle + width * (1 - share)
    low, high = [np.append(own, KINKS) for own in (low, high)]  # points
    low, high = np.append(low, KINKS), np.append(high, np.array(KINKS) + 0.7)
    low, high = np.append(low, np.array(KINKS) - 0.7), np.append(high, KINKS)
    centre = low + generator.uniform(size=len(low)) * (high - low)
    return low, high, np.clip(centre, low, high)


LOW, HIGH, CENTRE = ranges()


def on_all(functions: UnitFunctions) -> OnRanges:
    return functions.on(LOW, HIGH, Interval.of(CENTRE))


@pytest.mark.parametrize("name", sorted(CASES.keys() - LINEAR))
def test_differences_lie_within_what_is_known_of_the_range(name: str) -> None:
    module, function, _ = CASES[name]
    found = on_all(functions_of(module))
    with mp.workdps(DIGITS):
        tiny = mpmath.mpf(10) ** -40
        for unit, (low, high, centre) in enumerate(zip(LOW, HIGH, CENTRE, strict=True)):
            first, last = mpmath.mpf(low), mpmath.mpf(high)
            points = [first + (last - first) * i / 8 for i in range(9)]
            values = [function(x) for x in points]
            own = function(mpmath.mpf(centre))
            for x, value in zip(points, values, strict=True):
                moved = x - mpmath.mpf(centre)
                above, below = (
                    mpmath.mpf(line.slope[unit]) * moved + mpmath.mpf(line.offset[unit])
                    for line in (found.above, found.below)
                )
                assert below - tiny <= value - own <= above + tiny
                assert found.least[unit] - tiny <= value - own <= found.most[unit] + tiny
            if low == high:
                continue
            pairs = zip(points, points[1:], values, values[1:], strict=False)
            slopes = [(b - a) / (y - x) for x, y, a, b in pairs]
            assert found.lower[unit] - tiny <= min(slopes)
            assert max(slopes) <= found.upper[unit] + tiny


@pytest.mark.parametrize("name", sorted(CASES.keys() - LINEAR))
def test_on_short_ranges_hardly_more_than_the_derivative(name: str) -> None:
    functions = functions_of(CASES[name][0])
    points = np.array([-7.3, -2.2, -1.1, -0.37, 0.11, 0.77, 1.3, 2.6, 4.4])
    found = functions.on(points - 1e-6, points + 1e-6, Interval.of(points))
    assert (found.upper - found.lower).max() <= 1e-5
    short = functions.on(points - 1e-2, points + 1e-2, Interval.of(points))
    gap = short.above.offset - short.below.offset
    assert gap.max() <= 4e-4
    assert gap.min() >= 0


def test_kinks_that_a_range_only_touches_do_not_count() -> None:
    functions = functions_of(nn.ReLU())
    low, high = np.array([0.0, -1.0, -1.0, 0.5]), np.array([1.0, 0.0, 1.0, 0.5])
    found = functions.on(low, high, Interval.of(low))
    assert found.lower.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert found.upper.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_next_to_a_kink_slopes_are_those_of_its_side() -> None:
    """Between neighbouring numbers the middle is one of them, perhaps the kink."""
    tiny = 2.0**-1074
    left = functions_of(nn.ELU(3.0)).on(-np.ones(1) * tiny, np.zeros(1), Interval.of(np.zeros(1)))
    assert left.lower[0] <= 3.0 <= left.upper[0]
    both = functions_of(nn.ELU(3.0)).on(*np.array([[-tiny], [tiny]]), Interval.of(np.zeros(1)))
    assert both.lower[0] <= 1.0 and both.upper[0] >= 3.0
    below, above = np.nextafter(3.0, 0.0), np.nextafter(3.0, 4.0)
    for low, high, slope in ((below, 3.0, 1.5), (3.0, above, 1.0), (below, above, 1.5)):
        on = functions_of(nn.Hardswish()).on(
            *np.array([[low], [high]]), Interval.of(np.ones(1) * 3)
        )
        assert on.lower[0] - 1e-9 <= slope <= on.upper[0] + 1e-9


def test_lines_of_a_relu_are_its_chord_and_the_nearer_side() -> None:
    functions = functions_of(nn.ReLU())
    low, high = np.array([-1.0, -3.0]), np.array([3.0, 1.0])
    found = functions.on(low, high, Interval.of(np.zeros(2)))
    np.testing.assert_allclose(found.above.slope, [0.75, 0.25], rtol=1e-12)
    np.testing.assert_allclose(found.above.offset, [0.75, 0.75], rtol=1e-12)
    assert found.below.slope.tolist() == [1.0, 0.0]
    assert np.abs(found.below.offset).max() < 1e-14


def test_cells_have_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what a cell may exceed its ends by, lines of smooth functions cut them."""
    points = np.linspace(-2.0, 2.0, 41)
    functions = functions_of(nn.Tanh())
    coarse = UnitFunctions(functions.values, functions.slopes, functions.kinks, 1)
    low, high = points - 0.5, points + 0.5

    def exceeded() -> bool:
        found = coarse.on(low, high, Interval.of(points))
        x = low + (high - low) * np.linspace(0, 1, 201)[:, None]
        moved = np.tanh(x) - np.tanh(points)
        line = found.above.slope * (x - points) + found.above.offset
        return bool((moved > line + 1e-9).any())

    assert not exceeded()
    monkeypatch.setattr("lipfast.rules.on_ranges.UNIT_ROUNDOFF", -1.0 / 16)
    assert exceeded()


def _always(slopes: Interval, x: Interval) -> Interval:
    return slopes + x * Interval.of(0.0)


def test_slopes_far_apart_do_not_hide_each_other() -> None:
    """A function may rise by 1e-30 and fall back at once: neither number may get lost."""

    def zeros(x: Interval) -> Interval:
        return x * Interval.of(0.0)

    for low, high in ((-1e300, 1e-30), (-1e-30, 1e300)):
        functions = UnitFunctions(zeros, partial(_always, Interval.of(low, high)), (), 1)
        found = functions.on(np.zeros(1), np.ones(1), Interval.of(np.zeros(1)))
        assert found.most[0] >= 1e-30
        assert found.least[0] <= -1e-30


def test_a_cell_without_known_slopes_says_nothing_of_values() -> None:
    """``1 / (x^2 - x + 0.3)``: in cells around 1/2 the divisor may be 0, for all that is known."""

    class Peak(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.reciprocal(x * x - x + 0.3)

    plan = Plan.trace(Peak(), torch.zeros(2, 1, dtype=torch.float64))
    node = join_compositions(plan.graph).nodes[-1]
    functions = unit_functions(Call(node, 2, [Upward.of(1.0)], [(1,)], 0.0, {}, {}), None)
    assert functions is not None
    low, high, centre = np.array([-20.0]), np.array([20.0]), np.zeros(1)
    found = functions.on(low, high, Interval.of(centre))
    assert found.upper[0] == math.inf
    assert not found.most[0] < 1 / 0.05 - 1 / 0.3
    within = found.within(
        of_slopes_alone(-np.ones(1) * 100, np.ones(1) * 100, low, high), low, high
    )
    assert within.above.slope[0] * 0.5 + within.above.offset[0] >= 1 / 0.05 - 1 / 0.3 - 1e-9


def test_a_slope_of_a_prelu_that_is_computed_is_known_to_its_rounding() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.tensor(1 / 3, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.prelu(x, (self.first * 3.0).reshape(1))

    found = functions_of(Computed()).on(-np.ones(1), np.zeros(1), Interval.of(np.zeros(1)))
    assert Fraction(found.lower[0]) <= 3 * Fraction(1 / 3) <= Fraction(found.upper[0])


def test_slopes_alone_bound_all_functions_that_have_them() -> None:
    generator = np.random.default_rng(1)
    lower = generator.normal(size=50)
    upper = lower + generator.uniform(size=50) * (np.arange(50) % 5 > 0)
    low, high = -generator.uniform(size=50), generator.uniform(size=50)
    low[:3], high[3:6] = 0.0, 0.0
    low[6:8] = high[6:8] = 0.0
    found = of_slopes_alone(lower, upper, low, high)
    for share in np.linspace(0, 1, 21):
        x = low + share * (high - low)
        for slope in (lower, upper):
            assert (slope * x <= found.above.slope * x + found.above.offset + 1e-15).all()
            assert (slope * x >= found.below.slope * x + found.below.offset - 1e-15).all()
            assert (slope * x <= found.most).all()
            assert (slope * x >= found.least).all()


class _Composition(nn.Module):
    """``x sigmoid(w x)`` with an entry of w for each entry of x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.weight * x)


def test_several_ops_that_are_one_function_with_numbers_of_their_own() -> None:
    module = _Composition()
    plan = Plan.trace(module, torch.zeros(2, 3, dtype=torch.float64))
    node = join_compositions(plan.graph).nodes[-1]
    parameters = plan.resolve(module.state_dict())
    call = Call(node, 2, [Upward.of(1.0)], [(3,)], 0.0, parameters, plan.constants)
    for places in (None, torch.tensor([2, 0])):
        found = unit_functions(call, places)
        assert found is not None
        weight = module.weight.detach() if places is None else module.weight.detach()[places]
        count = len(weight)
        on = found.on(np.full(count, 0.2), np.full(count, 0.3), Interval.of(np.full(count, 0.2)))
        x = torch.linspace(0.2, 0.3, 101, dtype=torch.float64)[:, None].requires_grad_()
        values = (x * torch.sigmoid(weight * x)).detach().numpy()
        slopes = np.diff(values, axis=0) / 0.001
        assert (on.lower - 1e-9 <= slopes).all()
        assert (slopes <= on.upper + 1e-9).all()
        assert (on.upper - on.lower).max() < 0.3


def test_nothing_is_said_of_what_has_no_formula() -> None:
    assert unit_functions(call_of(nn.Threshold(0.1, 20.0), (1,)), None) is None
    crossed = functions_of(nn.Hardtanh(-1.0, 1.0)).on(
        np.array([-math.inf]), np.array([math.nan]), Interval.of(np.zeros(1))
    )
    assert not bool(np.isfinite(crossed.above.offset).all())

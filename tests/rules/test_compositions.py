"""Suprema of the slopes of functions of one variable: never below, and hardly above."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp
from torch import Tensor, nn
from torch.nn import functional

from lipfast.estimators.domain import Box
from lipfast.estimators.enclosure import missing_error_rules
from lipfast.estimators.plan import Plan
from lipfast.rules import pointwise
from lipfast.rules.formulas import Formula, result
from lipfast.rules.growth import Growth, Tail
from lipfast.rules.intervals import Interval
from lipfast.rules.scalar_functions import FUNCTIONS, ONE, Jet
from tests.support.explicit import NORMS, Function

mp.dps = 40
ROOT = math.sqrt(2.0)
Scalar = Callable[[Tensor], Tensor]

# Wordings of functions whose constants are known.
KNOWN: dict[str, tuple[Scalar, float]] = {
    "silu": (lambda x: x * torch.sigmoid(x), pointwise.SILU),
    "silu, the other way round": (lambda x: torch.sigmoid(x) * x, pointwise.SILU),
    "silu by exp": (lambda x: x / (1 + torch.exp(-x)), pointwise.SILU),
    "QuickGELU": (lambda x: x * torch.sigmoid(1.702 * x), pointwise.SILU),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / ROOT)), pointwise.GELU),
    "gelu, another order": (lambda x: x * 0.5 * (1.0 + torch.erf(x * ROOT / 2)), pointwise.GELU),
    "gelu, halved last": (lambda x: x * (torch.erf(x / 2**0.5) + 1) / 2, pointwise.GELU),
    "mish": (lambda x: x * torch.tanh(functional.softplus(x)), pointwise.MISH),
    "hardswish": (lambda x: x * functional.relu6(x + 3) / 6, pointwise.HARDSWISH),
    "hardswish, a gate": (lambda x: x * functional.hardsigmoid(x), pointwise.HARDSWISH),
    "sigmoid": (lambda x: 1 / (1 + torch.exp(-x)), 0.25),
    "sigmoid, a quotient": (lambda x: torch.exp(x) / (1 + torch.exp(x)), 0.25),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), 1.0),
    "softplus, log1p": (lambda x: torch.log1p(torch.exp(x)), 1.0),
    "softplus, stable": (lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())), 1.0),
    "logsigmoid": (lambda x: -torch.log(1 + torch.exp(-x)), 1.0),
    "softsign": (lambda x: x / (1 + x.abs()), 1.0),
    "a flatter softsign": (lambda x: x / (2 + x.abs()), 0.5),
    "tanh by exp": (lambda x: 2 / (1 + torch.exp(-2 * x)) - 1, 1.0),
    "tanhshrink": (lambda x: x - torch.tanh(x), 1.0),
    "gaussian": (lambda x: torch.exp(-(x**2)), math.sqrt(2 / math.e)),
    "cauchy": (lambda x: 1 / (1 + x.square()), 3 * math.sqrt(3) / 8),
    "isru": (lambda x: x / torch.sqrt(1 + x * x), 1.0),
    "isru, a power": (lambda x: x * (1 + x**2) ** -0.5, 1.0),
    "square of tanh": (lambda x: torch.tanh(x) ** 2, 4 / 3**1.5),
    "exp of tanh": (lambda x: torch.exp(torch.tanh(x)), 1.2535595647),
    "leaky relu": (lambda x: torch.maximum(x, 0.1 * x), 1.0),
    "pseudo-Huber": (lambda x: torch.sqrt(1 + (x / 2) ** 2) - 1, 0.5),
    "snake": (lambda x: x + torch.sin(3 * x).square() / 3, 2.0),
}
# Those whose constants are what samples of the derivative say.
OTHERS: dict[str, Scalar] = {
    "gelu by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "gelu by tanh, factored": lambda x: (
        0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))
    ),
    "silu and a slope": lambda x: functional.silu(x) + 0.3 * x,
    "gated softplus": lambda x: functional.softplus(x) * torch.sigmoid(x),
    "clamped square": lambda x: x.clamp(-1, 2) * functional.relu6(x),
    "arctangent": lambda x: x / (1 + torch.atan(x).square()) * torch.sigmoid(-x.abs()),
    "elu": lambda x: functional.relu(x) + torch.expm1(-functional.relu(-x)),
}


def upper(function: Scalar, **options: object) -> float:
    plan = Plan.trace(Function(function), torch.zeros(2, 3))
    assert not missing_error_rules(plan)
    bound = plan.upper({}, **options)  # type: ignore[arg-type]
    assert bound.certified
    return bound.value


@pytest.mark.parametrize("name", KNOWN)
def test_known_functions_in_other_words(name: str) -> None:
    function, truth = KNOWN[name]
    for norm in NORMS if name == "silu" else [2]:
        assert truth * (1 - 1e-9) <= upper(function, norm=norm) <= truth * (1 + 1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_as_steep_as_samples_say(name: str) -> None:
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(OTHERS[name](x).sum(), x)
    truth = float(slopes.abs().max())
    assert truth * (1 - 1e-13) <= upper(OTHERS[name]) <= truth * (1 + 1e-6)


def test_on_a_domain_the_supremum_is_that_of_the_domain() -> None:
    near = upper(lambda x: x * torch.sigmoid(x), domain=Box(-0.5, 0.5))
    s = 1 / (1 + math.exp(-0.5))
    assert near == pytest.approx(s + 0.5 * s * (1 - s), rel=1e-6)
    assert upper(torch.exp, domain=Box(-2, 1)) == pytest.approx(math.exp(2), rel=1e-6)
    assert upper(torch.exp) == math.inf


def test_compositions_may_have_no_constant_and_say_so() -> None:
    plan = Plan.trace(Function(lambda x: functional.relu(x) ** 2), torch.zeros(2, 3))
    bound = plan.upper({})
    assert bound.value == math.inf
    assert "aten.pow" in (bound.reason or "")


class Swish(nn.Module):
    """``x sigmoid(softplus(beta) x) / 1.1`` with a slope for every feature, or one."""

    def __init__(self, *beta: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * functional.softplus(self.beta)) / 1.1


@pytest.mark.parametrize("beta", [(0.5,), (-3.0, 0.0, 2.0)])
def test_slopes_are_parameters(beta: tuple[float, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Swish(*beta), nn.Linear(3, 3)).double()
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    plain = nn.Sequential(model[0], nn.SiLU(), model[2])
    expected = Plan.trace(plain, torch.zeros(2, 3, dtype=torch.float64)).upper(plain.state_dict())
    bound = plan.upper(model.state_dict())
    assert bound.value == pytest.approx(expected.value / 1.1, rel=1e-6)
    lower = plan.lower(model.state_dict(), torch.randn(20, 3, dtype=torch.float64))
    assert lower.certified
    assert 0.0 < lower.value <= bound.value


class Gate(nn.Module):
    """``c x sigmoid(b x)`` with numbers for every feature."""

    def __init__(self, b: Tensor, c: Tensor | float = 1.0) -> None:
        super().__init__()
        self.b = nn.Parameter(b)
        self.c = nn.Parameter(torch.as_tensor(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.c * x * torch.sigmoid(self.b * x)


def test_signs_of_parameters_differ() -> None:
    gate = Gate(torch.tensor([-2.0, 0.0, 0.7]))
    plan = Plan.trace(gate, torch.zeros(2, 3))
    assert plan.upper(gate.state_dict()).value == pytest.approx(pointwise.SILU, rel=1e-6)


@pytest.mark.parametrize(("count", "room"), [(301, 1e-6), (2001, 0.06), (20_000, 0.06)])
def test_many_features_with_numbers_of_all_sizes_and_signs(count: int, room: float) -> None:
    sizes = torch.logspace(-4, 1, count // 2)
    b = torch.cat([sizes, -sizes.flip(0), torch.zeros(count % 2)])
    for gate in (Gate(b), Gate(b, torch.linspace(-1, 1, count))):
        plan = Plan.trace(gate, torch.zeros(2, count))
        bound = plan.upper(gate.state_dict())
        assert pointwise.SILU * (1 - 1e-9) <= bound.value <= pointwise.SILU * (1 + room)


def test_the_graph_that_is_evaluated_stays_as_it_was() -> None:
    plan = Plan.trace(Function(lambda x: x * torch.sigmoid(x)), torch.zeros(2, 3))
    assert [node.op for node in plan.graph.nodes[1:]] == ["aten.sigmoid", "aten.mul"]
    assert [part.op for part in plan.upper({}).composition.parts.values()] == [
        "input",
        "lipfast.composition",
    ]
    assert plan.upper({}, simplify=False).value == plan.upper({}).value


def test_different_variables_are_no_function_of_one() -> None:
    for function in (lambda x: x * x.sigmoid().flip(1), lambda x: x * x[:, :1].sigmoid()):
        plan = Plan.trace(Function(function), torch.zeros(2, 3))
        assert plan.upper({}).value == math.inf


@pytest.mark.parametrize("function", [torch.log, torch.sqrt, lambda x: 1 / x])
def test_alone_they_are_refused(function: Scalar) -> None:
    with pytest.raises(NotImplementedError, match=r"near to 0|division by an activation"):
        Plan.trace(Function(function), torch.zeros(2, 3))


PRECISE: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "erf": mpmath.erf,
    "exp": mpmath.exp,
    "log": mpmath.log,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "root": mpmath.sqrt,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "atan": mpmath.atan,
    "inverse": lambda x: 1 / x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_intervals_hold_values_and_derivatives(name: str) -> None:
    generator = np.random.default_rng(3)
    positive = name in ("log", "root")
    centres = generator.normal(size=40) * 10.0 ** generator.uniform(-3, 2, 40)
    centres = np.abs(centres) if positive else centres
    widths = 10.0 ** generator.uniform(-9, 0.5, 40)
    low = centres if positive else centres - widths
    with np.errstate(all="ignore"):
        taken = FUNCTIONS[name](Interval.of(low, centres + widths))
    for index in range(40):
        for share in (0.0, 0.3, 1.0):
            x = mpmath.mpf(low[index]) + share * (
                mpmath.mpf((centres + widths)[index]) - mpmath.mpf(low[index])
            )
            if name == "inverse" and abs(x) < 1e-6:
                continue
            for order, found in enumerate(taken):
                truth = mpmath.diff(PRECISE[name], x, order)
                assert found.low[index] <= truth + mpmath.mpf(10) ** -18
                assert truth - mpmath.mpf(10) ** -18 <= found.high[index]


def programs() -> list[tuple[Formula, int]]:
    """Random formulas of a few steps."""
    generator = np.random.default_rng(8)
    found = []
    for _ in range(120):
        formula = Formula()
        positions = [0, formula.number(float(generator.choice([0.5, -1.5, 2.0])))]
        for _ in range(int(generator.integers(2, 6))):
            a, b = (positions[int(generator.integers(len(positions)))] for _ in range(2))
            kind = int(generator.integers(6))
            one = formula.add(formula.number(1.0), formula.mul(a, a))
            made = [
                formula.add(a, b),
                formula.mul(a, b),
                formula.larger(a, b),
                formula.then(str(generator.choice(["sigmoid", "tanh", "erf", "softplus"])), a),
                formula.then(str(generator.choice(["inverse", "log", "root"])), one),
                formula.then("exp", formula.neg(formula.mul(a, a))),
            ]
            positions.append(made[kind])
        found.append((formula, positions[-1]))
    return found


class Precise:
    """A number with its derivative, in many digits."""

    def __init__(self, value: object, slope: object) -> None:
        self.value, self.slope = mpmath.mpf(value), mpmath.mpf(slope)

    def __add__(self, other: Precise) -> Precise:
        return Precise(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other: Precise) -> Precise:
        slope = self.slope * other.value + self.value * other.slope
        return Precise(self.value * other.value, slope)

    def __neg__(self) -> Precise:
        return Precise(-self.value, -self.slope)

    def square(self) -> Precise:
        return self * self

    def larger(self, other: Precise) -> Precise:
        return self if self.value >= other.value else other

    def then(self, function: str) -> Precise:
        slope = mpmath.diff(PRECISE[function], self.value)
        return Precise(PRECISE[function](self.value), slope * self.slope)


def holds(interval: Interval, value: mpmath.mpf, slack: float = 1e-15) -> bool:
    room = slack * (1 + abs(value))
    return bool(float(interval.low) <= value + room and value - room <= float(interval.high))


def test_random_formulas_lie_in_their_enclosures() -> None:
    points = [-7.5, -1.25, 0.3, 2.0, 9.0]
    sharp = 0
    for formula, position in programs():
        program = formula.finished(position)
        if not program:
            continue
        for point in points:
            truth = result(program, Precise(point, 1), lambda v: Precise(float(v.low), 0), {})
            with np.errstate(all="ignore"):
                cell = Jet(Interval.of(point - 0.1, point + 0.05), ONE, Interval.of(0.0))
                jet = result(program, cell, Jet.constant, {})
            assert holds(jet.value, truth.value)
            assert holds(jet.slope, truth.slope)
            one = Growth(Interval.of(math.copysign(1.0, point)), 0.0, 0.0, 4.0)
            zero = one.at(Interval.of(0.0))
            tail = Tail(one.at(one.ratio, 1.0), one)
            with np.errstate(all="ignore"):
                far = result(program, tail, lambda v, o=one, z=zero: Tail(o.at(v), z), {})
            if abs(point) >= 4.0:
                assert holds(far.value.range, truth.value)
                assert holds(far.slope.range, truth.slope * mpmath.sign(point))
                sharp += bool(np.isfinite(far.slope.range.size))
    assert sharp > 60  # most are bounded

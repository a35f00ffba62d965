"""Ranges of slopes hold every difference quotient, in many digits, and are hardly wider."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import mpmath
import pytest
import torch
from mpmath import mp
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, TraceError
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper.sweep import ITSELF, sweep_of
from lipfast.rules import RULES
from lipfast.rules.registry import Call, SlopeRange
from lipfast.rules.slopes import hull
from tests.rules.test_compositions import KNOWN, OTHERS
from tests.rules.test_pointwise import FUNCTIONS
from tests.support.explicit import Function

Scalar = Callable[[mpmath.mpf], mpmath.mpf]
DIGITS = 60


def sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def softplus(x: mpmath.mpf) -> mpmath.mpf:
    return max(x, mpmath.mpf(0)) + mpmath.log1p(mpmath.exp(-abs(x)))


def clip(x: mpmath.mpf, low: float, high: float) -> mpmath.mpf:
    return min(max(x, mpmath.mpf(low)), mpmath.mpf(high))


def elu(alpha: float, scale: float = 1.0, inner: float = 1.0) -> Scalar:
    left = mpmath.mpf(scale) * mpmath.mpf(alpha)
    return lambda x: scale * x if x > 0 else left * mpmath.expm1(inner * x)


def selu(x: mpmath.mpf) -> mpmath.mpf:
    alpha = mpmath.mpf("1.6732632423543772848170429916717")
    scale = mpmath.mpf("1.0507009873554804934193349852946")
    return scale * (x if x > 0 else alpha * mpmath.expm1(x))


def gelu_tanh(x: mpmath.mpf) -> mpmath.mpf:
    inner = mpmath.sqrt(2 / mp.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x * sigmoid(2 * inner)


def op(name: str, *arguments: float) -> nn.Module:
    called = getattr(torch.ops.aten, name)
    return Function(lambda x: called(x, *arguments))


# What torch computes in many digits, and points near which its slope is extremal.
CASES: dict[str, tuple[nn.Module, Scalar, tuple[float, ...]]] = {
    "relu": (nn.ReLU(), lambda x: max(x, mpmath.mpf(0)), ()),
    "relu6": (nn.ReLU6(), lambda x: clip(x, 0, 6), ()),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), lambda x: clip(x, -0.5, 2.0), ()),
    "clamp": (Function(lambda x: x.clamp(0.25, 2.0)), lambda x: clip(x, 0.25, 2.0), ()),
    "clamp_min": (Function(lambda x: x.clamp_min(0.3)), lambda x: max(x, mpmath.mpf(0.3)), ()),
    "clamp_max": (Function(lambda x: x.clamp_max(0.3)), lambda x: min(x, mpmath.mpf(0.3)), ()),
    "abs": (Function(torch.abs), abs, ()),
    "neg": (Function(torch.neg), lambda x: -x, ()),
    "leaky": (nn.LeakyReLU(0.3), lambda x: x * (1 if x > 0 else mpmath.mpf(0.3)), ()),
    "falling leaky": (nn.LeakyReLU(-2.5), lambda x: x * (1 if x > 0 else -2.5), ()),
    "steep leaky": (nn.LeakyReLU(3.0), lambda x: x * (1 if x > 0 else 3), ()),
    "rrelu": (
        nn.RReLU(0.1, 0.7).eval(),
        lambda x: x * (1 if x > 0 else (mpmath.mpf(0.1) + mpmath.mpf(0.7)) / 2),
        (),
    ),
    "elu": (nn.ELU(), elu(1.0), ()),
    "steep elu": (nn.ELU(3.1), elu(3.1), ()),
    "falling elu": (nn.ELU(-1.5), elu(-1.5), ()),
    "elu with scales": (op("elu", 1.3, -0.7, 0.9), elu(1.3, -0.7, 0.9), ()),
    "elu that is flat": (op("elu", 1.3, 0.7, 0.0), elu(1.3, 0.7, 0.0), ()),
    "selu": (nn.SELU(), selu, ()),
    "celu": (nn.CELU(0.4), lambda x: x if x > 0 else mpmath.mpf(0.4) * mpmath.expm1(x / 0.4), ()),
    "tanh": (nn.Tanh(), mpmath.tanh, ()),
    "sigmoid": (nn.Sigmoid(), sigmoid, ()),
    "hardsigmoid": (nn.Hardsigmoid(), lambda x: clip(x + 3, 0, 6) / 6, ()),
    "hardswish": (nn.Hardswish(), lambda x: x * clip(x + 3, 0, 6) / 6, (3.0, -3.0)),
    "gelu": (nn.GELU(), lambda x: x * mpmath.ncdf(x), (math.sqrt(2), -math.sqrt(2))),
    "gelu tanh": (nn.GELU(approximate="tanh"), gelu_tanh, (1.42, -1.42)),
    "silu": (nn.SiLU(), lambda x: x * sigmoid(x), (2.4, -2.4)),
    "mish": (nn.Mish(), lambda x: x * mpmath.tanh(softplus(x)), (1.49, -2.25)),
    "softsign": (nn.Softsign(), lambda x: x / (1 + abs(x)), (1e8,)),
    "log sigmoid": (nn.LogSigmoid(), lambda x: -softplus(-x), ()),
    "softshrink": (nn.Softshrink(0.3), lambda x: x - clip(x, -0.3, 0.3), ()),
    "sin": (Function(torch.sin), mpmath.sin, (math.pi,)),
    "cos": (Function(torch.cos), mpmath.cos, (math.pi / 2, -math.pi / 2)),
    "atan": (Function(torch.atan), mpmath.atan, (1e8,)),
    "erf": (Function(torch.erf), mpmath.erf, ()),
    "softplus": (nn.Softplus(3.0, 40.0), lambda x: softplus(3 * x) / 3, ()),
    "falling softplus": (nn.Softplus(-3.0, 40.0), lambda x: softplus(-3 * x) / -3, ()),
    "threshold": (nn.Threshold(0.5, 0.5), lambda x: max(x, mpmath.mpf(0.5)), ()),
    "prelu": (nn.PReLU(init=-1.75), lambda x: x * (1 if x > 0 else -1.75), ()),
    "times a number": (Function(lambda x: 0.1 * x), lambda x: x * mpmath.mpf(0.1), ()),
    "divided by a number": (Function(lambda x: x / 3), lambda x: x / 3, ()),
    "and a number": (Function(lambda x: x + 3), lambda x: x + 3, ()),
    "from a number": (Function(lambda x: 3 - x), lambda x: 3 - x, ()),
}


def call_of(module: nn.Module, shape: tuple[int, ...] = (3,)) -> Call:
    """What the rule of the last node sees."""
    module = copy.deepcopy(module).double()
    plan = Plan.trace(module, torch.zeros(2, *shape, dtype=torch.float64))
    step = sweep_of(plan, plan.folded).steps[-1]
    operands = [ITSELF] * len(step.references)
    return step.call(operands, [], plan.resolve(module.state_dict()), plan.constants, 2)


def slopes_of(module: nn.Module, shape: tuple[int, ...] = (3,)) -> SlopeRange | None:
    call = call_of(module, shape)
    slopes = RULES[call.node.op].slopes
    return None if slopes is None else slopes(call)


def quotients(function: Scalar, near: tuple[float, ...]) -> list[mpmath.mpf]:
    """Of neighbours on a grid, of far points, and of points that are very near together."""
    grid = [mpmath.mpf(step) / 16 for step in range(-200, 201)]
    values = [function(x) for x in grid]
    found = []
    for distance in (1, 7, 150):
        found += [
            (values[i + distance] - values[i]) / (grid[i + distance] - grid[i])
            for i in range(len(grid) - distance)
        ]
    small = mpmath.mpf(10) ** -20
    peaks = [mpmath.mpf(point) for point in (0.0, 45.0, -45.0, 5.0, -5.0)]
    peaks += [mpmath.mpf(point) for point in near]
    for point in near:
        peaks.append(mpmath.mpf(point))
        for _ in range(12):  # Newton's method for a zero of the second derivative
            first = mpmath.diff(function, peaks[-1], 2, h=mpmath.mpf(10) ** -12)
            second = mpmath.diff(function, peaks[-1], 3, h=mpmath.mpf(10) ** -10)
            if abs(second) > 1e-3:
                peaks[-1] -= first / second
    for point in peaks:
        for x, y in (
            (point, point + small),
            (point - small, point),
            (point - small, point + small),
        ):
            found.append((function(y) - function(x)) / (y - x))
    return found


@pytest.mark.parametrize("name", CASES)
def test_quotients_lie_between_the_slopes_which_they_nearly_attain(name: str) -> None:
    module, function, near = CASES[name]
    slopes = slopes_of(module)
    assert slopes is not None
    low, high = (mpmath.mpf(float(end)) for end in slopes)
    with mp.workdps(DIGITS):
        found = quotients(function, near)
        rounding = mpmath.mpf(10) ** -30  # of the quotients
        assert low - rounding <= min(found) <= low + mpmath.mpf(10) ** -12
        assert high - mpmath.mpf(10) ** -12 <= max(found) <= high + rounding


@pytest.mark.parametrize("name", CASES)
def test_the_functions_in_many_digits_are_those_of_torch(name: str) -> None:
    module, function, _ = CASES[name]
    x = torch.linspace(-7, 7, 57, dtype=torch.float64)
    values = copy.deepcopy(module).double()(x[:, None].expand(-1, 3))[:, 0]
    truth = torch.tensor([float(function(mpmath.mpf(point))) for point in x.tolist()])
    torch.testing.assert_close(values.double(), truth.double(), rtol=1e-6, atol=1e-6)


def test_every_pointwise_rule_with_a_constant_has_slopes_that_fit_it() -> None:
    for name, module in FUNCTIONS.items():
        slopes = slopes_of(module)
        assert slopes is not None, name
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in slopes)
        steepest = float(torch.maximum(low.abs(), high.abs()).max())
        bound = lipfast.upper_bound(module, torch.zeros(1, 3)).value
        assert bool((low <= high).all())
        assert steepest <= bound * (1 + 1e-15)


@pytest.mark.parametrize(
    "module",
    [
        nn.Hardshrink(0.5),
        nn.Threshold(0.1, 20.0),
        nn.CELU(-1.0),
        op("elu", 1.0, 1.0, -1.0),
        nn.Softplus(threshold=1.0),
        Function(lambda x: x / 0.0),
        Function(lambda x: x[:, :1] * x),
        Function(lambda x: x[:, :1] + torch.ones(3, dtype=x.dtype)),
        Function(lambda x: x + x.flip(1)),
    ],
    ids=["hardshrink", "jump", "celu", "elu", "softplus", "zero", "product", "copies", "sum"],
)
def test_where_there_are_none(module: nn.Module) -> None:
    assert slopes_of(module) is None


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_prelu_has_slopes_per_channel(shape: tuple[int, ...]) -> None:
    module = nn.PReLU(3 if shape else 1)
    weights = torch.tensor([0.5, -3.0, 2.0][: module.weight.numel()])
    with torch.no_grad():
        module.weight.copy_(weights)
    slopes = slopes_of(module, shape)
    assert slopes is not None
    low, high = (torch.as_tensor(end).expand(shape).reshape(len(weights), -1) for end in slopes)
    assert low[:, 0].tolist() == weights.clamp_max(1.0).tolist()
    assert high[:, -1].tolist() == weights.clamp_min(1.0).tolist()


class Computed(nn.Module):
    """PReLU, or a product, with numbers that are computed from parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.tensor([0.3, -0.7, 1.9]))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / 3
        if self.kind == "prelu":
            return nn.functional.prelu(x, weight)
        return x * weight if self.kind == "mul" else x / weight


@pytest.mark.parametrize("kind", ["prelu", "mul", "div"])
def test_numbers_that_are_computed_are_enclosed(kind: str) -> None:
    module = Computed(kind)
    slopes = slopes_of(module)
    assert slopes is not None
    for index, number in enumerate(module.weight.tolist()):
        truth = Fraction(number) / 3
        truth = 1 / truth if kind == "div" else truth
        low, high = (Fraction(float(torch.as_tensor(end)[index])) for end in slopes)
        ends = (min(truth, 1), max(truth, 1)) if kind == "prelu" else (truth, truth)
        assert low <= ends[0] <= ends[1] <= high
        assert high - low <= ends[1] - ends[0] + Fraction(1, 10**12)
        if kind != "prelu":
            assert low < truth < high


@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_slopes_of_compositions(name: str) -> None:
    """What samples of the derivative say; hardsigmoid's is that of a rounded 1 / 6 in torch."""
    function = KNOWN[name][0] if name in KNOWN else OTHERS[name]
    call = call_of(Function(function))
    if call.node.op != "lipfast.composition":
        return
    slopes = RULES[call.node.op].slopes
    assert slopes is not None
    low, high = slopes(call)  # type: ignore[misc]
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(function(x).sum(), x)
    assert float(low) <= float(found.min()) + 2e-8
    assert float(high) >= float(found.max()) - 2e-8
    assert float(low) >= float(found.min()) - 5e-3
    assert float(high) <= float(found.max()) + 1e-6


def test_a_composition_of_both_signs_is_known_by_both() -> None:
    slopes = slopes_of(Function(lambda x: x - nn.functional.relu(x)))
    assert slopes == pytest.approx((0.0, 1.0), abs=1e-15)
    assert slopes_of(Function(lambda x: nn.functional.relu(x) ** 2)) is None
    call = call_of(Function(lambda x: x * torch.sigmoid(x)))
    assert call.node.op == "lipfast.composition"
    near = replace(call, magnitudes=[lipfast.rules.magnitude.Magnitude(entry=ITSELF)])
    within = RULES[call.node.op].slopes(near)  # type: ignore[misc]
    s = 1 / (1 + math.exp(-1.0))
    assert within == pytest.approx((1 - s - s * (1 - s), s + s * (1 - s)), rel=1e-8)


def test_hulls_are_rounded_outwards() -> None:
    low, high = hull(Fraction(1, 3), Fraction(-1, 10)) or (0.0, 0.0)
    assert Fraction(low) < Fraction(-1, 10) < Fraction(math.nextafter(low, 1))
    assert Fraction(math.nextafter(high, 0)) < Fraction(1, 3) < Fraction(high)
    assert hull(1.0, -0.5) == (-0.5, 1.0)
    assert hull(1.0, math.inf) is hull(math.nan) is hull(Fraction(10) ** 400) is None


@pytest.fixture
def asinh() -> object:
    yield "aten.asinh"
    RULES.pop("aten.asinh", None)


def registered(slopes: object) -> SlopeRange | None:
    lipfast.rule("aten.asinh", slopes=slopes)(lambda call: call.input)  # type: ignore[arg-type]
    return slopes_of(Function(torch.asinh))


def test_slopes_of_a_users_rule(asinh: str) -> None:
    assert registered((0, 1)) == (0.0, 1.0)
    assert registered(lambda call: (0.0, 1.0)) == (0.0, 1.0)
    assert registered(None) is registered(lambda call: None) is None
    low, high = registered(lambda call: (0, torch.ones(3))) or (0.0, 0.0)
    assert torch.equal(torch.as_tensor(high), torch.ones(3, dtype=torch.float64))
    assert float(low) == 0.0


@pytest.mark.parametrize("slopes", [(1, 0), (0, math.inf), (math.nan, 1), 3, "ab", (1, 2, 3)])
def test_slopes_that_are_no_range_are_refused(asinh: str, slopes: object) -> None:
    with pytest.raises(ArgumentError, match="slopes must be two finite numbers"):
        registered(slopes)


@pytest.mark.parametrize(
    "answer", [(1.0, 0.0), (0.0, math.inf), (0.0, torch.ones(4)), (0.0, torch.ones(2, 3)), 7, "ab"]
)
def test_a_function_that_answers_amiss_is_named(asinh: str, answer: object) -> None:
    with pytest.raises(TraceError, match=r"aten\.asinh.*'slopes' of its rule"):
        registered(lambda call: answer)


def test_a_users_rule_has_the_slopes_that_it_says(asinh: str) -> None:
    before = RULES["aten.tanh"]
    try:
        lipfast.rule("aten.tanh")(lambda call: call.input)
        assert slopes_of(nn.Tanh()) is None
    finally:
        RULES["aten.tanh"] = before
    assert slopes_of(nn.Tanh()) == (0.0, 1.0)

"""Constants of pointwise functions: at least the true supremum, and hardly more."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from mpmath import iv, mp
from torch import Tensor, nn

from lipfast.estimators.enclosure import enclose
from lipfast.estimators.plan import Plan
from lipfast.graph.nodes import Node, Reference
from lipfast.ops.chain_stages import ACTIVATIONS, Activation, output_shape
from lipfast.rules import RULES, pointwise
from tests.support.explicit import Function, check_enclosure, traced

mp.dps = 40

FUNCTIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 2.0),
    "leaky relu": nn.LeakyReLU(0.3),
    "steep leaky relu": nn.LeakyReLU(-2.5),
    "elu": nn.ELU(),
    "steep elu": nn.ELU(3.0),
    "negative elu": nn.ELU(-2.0),
    "celu": nn.CELU(0.4),
    "selu": nn.SELU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "sharp softplus": nn.Softplus(beta=3.0, threshold=40.0),
    "softsign": nn.Softsign(),
    "logsigmoid": nn.LogSigmoid(),
    "softshrink": nn.Softshrink(0.3),
    "prelu": nn.PReLU(init=-1.7),
    "rrelu": nn.RReLU(0.5, 3.0).eval(),
    "sine": Function(torch.sin),
    "cosine": Function(torch.cos),
    "arctangent": Function(torch.atan),
    "error function": Function(torch.erf),
}


def constant(module: nn.Module, norm: float = 2) -> float:
    plan = Plan.trace(module, torch.zeros(2, 3))
    return plan.upper(module.state_dict(), norm=norm).value


def difference_quotients(module: nn.Module) -> Tensor:
    """Quotients of neighbours and of random pairs, less the rounding of the evaluations."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    x = torch.cat([grid[:-1], 8 * torch.randn(50_000, generator=generator, dtype=torch.float64)])
    y = torch.cat([grid[1:], 8 * torch.randn(50_000, generator=generator, dtype=torch.float64)])
    with torch.no_grad():
        wide = module.double()
        first, second = wide(x[:, None])[:, 0], wide(y[:, None])[:, 0]
        module.float()
    rounding = 2.0**-49 * (first.abs() + second.abs() + 1.0)
    return ((first - second).abs() - rounding) / (x - y).abs()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constant_bounds_difference_quotients_and_is_nearly_attained(name: str) -> None:
    module = FUNCTIONS[name]
    largest = float(difference_quotients(module).max())
    bound = constant(module)
    assert bound >= largest
    assert bound <= largest * (1 + 2e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_constant_is_the_same_in_all_norms(name: str) -> None:
    module = FUNCTIONS[name]
    assert constant(module, 1) == constant(module, 2) == constant(module, math.inf)


def normal_density(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mp.pi)


def sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def gelu_slope(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.ncdf(x) + x * normal_density(x)


def gelu_tanh_slope(x: mpmath.mpf) -> mpmath.mpf:
    scale, cubic = mpmath.sqrt(2 / mp.pi), mpmath.mpf("0.044715")
    inner = scale * (x + cubic * x**3)
    slope = scale * (1 + 3 * cubic * x * x)
    return (1 + mpmath.tanh(inner)) / 2 + x / 2 * mpmath.sech(inner) ** 2 * slope


def silu_slope(x: mpmath.mpf) -> mpmath.mpf:
    return sigmoid(x) * (1 + x * (1 - sigmoid(x)))


def mish_slope(x: mpmath.mpf) -> mpmath.mpf:
    soft = mpmath.log(1 + mpmath.exp(x))
    return mpmath.tanh(soft) + x * mpmath.sech(soft) ** 2 * sigmoid(x)


@pytest.mark.parametrize(
    ("value", "slope", "near"),
    [
        (pointwise.GELU, gelu_slope, 1.41),
        (pointwise.GELU_TANH, gelu_tanh_slope, 1.42),
        (pointwise.SILU, silu_slope, 2.4),
        (pointwise.MISH, mish_slope, 1.49),
    ],
)
def test_supremum_rounded_up_to_the_next_float(
    value: float, slope: Callable[[mpmath.mpf], mpmath.mpf], near: float
) -> None:
    peak = mpmath.findroot(lambda x: mpmath.diff(slope, x), near)
    supremum = slope(peak)
    assert mpmath.mpf(math.nextafter(value, 0.0)) < supremum <= mpmath.mpf(value)
    # The peak is the global one: scan both sides.
    scan = [slope(mpmath.mpf(step) / 50) for step in range(-500, 501)]
    assert max(abs(entry) for entry in scan) <= supremum


def interval_normal(x: object) -> object:
    return iv.exp(-x * x / 2) / iv.sqrt(2 * iv.pi)  # type: ignore[operator]


def interval_sigmoid(x: object) -> object:
    return 1 / (1 + iv.exp(-x))  # type: ignore[operator]


def interval_ncdf(x: object) -> object:
    # The distribution function is monotone: its ends, evaluated to 40 digits, widened.
    ends = [mpmath.ncdf(mpmath.mpf(end)) for end in (x.a, x.b)]  # type: ignore[attr-defined]
    room = mpmath.mpf(10) ** -30
    return iv.mpf([ends[0] - room, ends[1] + room])


def gelu_tanh_interval(x: object) -> object:
    scale, cubic = iv.sqrt(2 / iv.pi), iv.mpf("0.044715")
    inner = scale * (x + cubic * x**3)  # type: ignore[operator]
    half = interval_sigmoid(2 * inner)
    slope = scale * (1 + 3 * cubic * x**2)  # type: ignore[operator]
    return half + 2 * x * half * (1 - half) * slope  # type: ignore[operator]


def mish_interval(x: object) -> object:
    power = (1 + iv.exp(x)) ** 2  # exp(2 softplus(x))
    tanh = (power - 1) / (power + 1)
    return tanh + x * 4 * power / (power + 1) ** 2 * interval_sigmoid(x)  # type: ignore[operator]


def silu_interval(x: object) -> object:
    s = interval_sigmoid(x)
    return s * (1 + x * (1 - s))  # type: ignore[operator]


INTERVALS = {
    "gelu": (pointwise.GELU, lambda x: interval_ncdf(x) + x * interval_normal(x), 14),
    "gelu tanh": (pointwise.GELU_TANH, gelu_tanh_interval, 9),
    "silu": (pointwise.SILU, silu_interval, 45),
    "mish": (pointwise.MISH, mish_interval, 45),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_suprema_are_enclosed_in_interval_arithmetic(name: str) -> None:
    """Bisection: no interval of [-reach, reach] can hold a slope above the constant by 1e-3.

    (Nearer to the peak the previous test decides.) Beyond, the slope differs from 0 or 1 by less
    than that: its other terms decay.
    """
    constant, slope, reach = INTERVALS[name]
    limit = constant + 1e-3
    work = [(-float(reach), float(reach))]
    while work:
        low, high = work.pop()
        found = slope(iv.mpf([low, high]))  # type: ignore[operator]
        if max(abs(found.a), abs(found.b)) <= limit:
            continue
        middle = (low + high) / 2
        assert high - low > 1e-6, f"{name} exceeds its constant near {middle}"
        work += [(low, middle), (middle, high)]


def test_remaining_constants_are_rounded_up() -> None:
    alpha = mpmath.mpf("1.6732632423543772848170429916717")
    scale = mpmath.mpf("1.0507009873554804934193349852946")
    assert mpmath.mpf(math.nextafter(pointwise.SELU, 0.0)) < alpha * scale <= pointwise.SELU
    assert math.nextafter(pointwise.HARDSIGMOID, 0.0) * 6 <= 1.0
    assert mpmath.mpf(pointwise.HARDSIGMOID) * 6 >= 1
    erf = 2 / mpmath.sqrt(mp.pi)
    assert mpmath.mpf(math.nextafter(pointwise.ERF, 0.0)) < erf <= mpmath.mpf(pointwise.ERF)


@pytest.mark.parametrize(
    "module",
    [
        nn.Hardshrink(0.5),
        nn.Threshold(0.1, 20.0),
        nn.CELU(-1.0),
        nn.Softplus(threshold=1.0),
        nn.Softplus(beta=-2.0, threshold=-10.0),
        nn.Softplus(threshold=13.9),
        nn.Softplus(threshold=math.nan),
    ],
    ids=[
        "hardshrink",
        "threshold",
        "celu with negative alpha",
        "softplus that jumps",
        "softplus that jumps far left",
        "softplus that jumps by a rounding",
        "softplus without a threshold",
    ],
)
def test_functions_without_a_constant_are_unbounded_with_a_reason(module: nn.Module) -> None:
    plan = Plan.trace(module, torch.zeros(2, 3))
    bound = plan.upper({})
    assert bound.value == math.inf
    assert bound.log_value == math.inf
    assert "no finite Lipschitz constant" in (bound.reason or "")


@pytest.mark.parametrize("value", [0.0, 0.7, -1.5])
def test_a_threshold_that_is_its_own_value_is_a_maximum(value: float) -> None:
    model = nn.Threshold(value, value)
    plan = traced(model, (3,))
    assert plan.upper({}).value == 1.0
    check_enclosure(plan, model, (3,), 1e-14)
    jump = Plan.trace(nn.Threshold(value, value + 1.0), torch.zeros(2, 3)).upper({})
    assert "it jumps at the threshold" in (jump.reason or "")


def test_clip_is_clamp() -> None:
    plan = Plan.trace(Function(lambda x: torch.clip(x, -1.0, 2.0)), torch.zeros(2, 3))
    assert [node.op for node in plan.graph.nodes] == ["input", "aten.clamp"]
    assert plan.upper({}).value == 1.0


def test_clamp_with_tensor_limits_is_refused() -> None:
    class Clamped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(x, min=-x)

    with pytest.raises(NotImplementedError, match="more than one tensor argument"):
        Plan.trace(Clamped(), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_prelu_slopes_per_channel(shape: tuple[int, ...]) -> None:
    module = nn.PReLU(3 if shape else 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, -3.0, 1.0][: module.weight.numel()]))
    plan = Plan.trace(module, torch.zeros(2, *shape))
    assert plan.upper(module.state_dict()).value == (3.0 if shape else 1.0)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    lower = plan.lower(module.state_dict(), x)
    assert lower.value <= (3.0 if shape else 1.0)
    assert lower.certified


def test_the_ideal_softplus_is_within_a_float32_rounding() -> None:
    threshold = pointwise.SOFTPLUS_THRESHOLD
    jump = mpmath.log1p(mpmath.exp(-threshold))
    assert jump <= threshold * mpmath.mpf(2) ** -24
    assert constant(nn.Softplus(threshold=threshold)) == 1.0


def truth_of_softplus(x: float, beta: float, threshold: float) -> mpmath.mpf:
    exact = mpmath.mpf(x) * beta
    return mpmath.mpf(x) if exact > threshold else mpmath.log1p(mpmath.exp(exact)) / beta


@pytest.mark.parametrize("threshold", [-10.0, -1.0, 0.0, 1.0, 13.0])
@pytest.mark.parametrize("beta", [1.0, -0.7, 3.0])
def test_softplus_with_a_low_threshold_is_evaluated_as_torch_has_it(
    beta: float, threshold: float
) -> None:
    plan = Plan.trace(nn.Softplus(beta, threshold), torch.zeros(2, 1))
    jump = threshold / beta
    steps = [0.0, 1e-15, -1e-15, 1e-9, -1e-9, 0.5, -0.5, 5.0, -5.0]
    x = torch.tensor([jump + step * max(1.0, abs(jump)) for step in steps], dtype=torch.float64)
    values, errors = enclose(plan, {}, x[None, :, None])
    for point, value, error in zip(x.tolist(), values.flatten(), errors.flatten(), strict=True):
        truth = truth_of_softplus(point, beta, threshold)
        assert abs(truth - mpmath.mpf(float(value))) <= mpmath.mpf(float(error))
    assert bool((errors.flatten()[3:] < 1e-12).all())  # a billionth from the jump it is certain
    assert bool(torch.isinf(errors.flatten()[0]))


def test_no_secant_beyond_what_a_jump_allows() -> None:
    """Behind the jump softplus is the identity, which the ideal function is not."""
    model = nn.Sequential(nn.Hardtanh(-5.0, 5.0), nn.Softplus(threshold=-10.0))
    x = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64)[:, None]
    lower = Plan.trace(model, x).lower(model.state_dict(), x)
    assert lower.certified
    assert 1.0 - 1e-9 < lower.value <= 1.0


def test_every_activation_of_a_chain_is_the_stage_of_one_rule() -> None:
    x = Reference("node", "x")
    nodes = [Node("y", op, (x,), shape=(3,)) for op in RULES]
    nodes.append(Node("y", "aten.gelu", (x,), (("approximate", "tanh"),), (3,)))
    pointwise_nodes = [node for node in nodes if RULES[node.op].leading and RULES[node.op].stage]
    stages = [RULES[node.op].stage(node, (3,)) for node in pointwise_nodes]  # type: ignore[misc]
    found = [stage for own in stages for stage in own or () if isinstance(stage, Activation)]
    assert sorted(stage.name for stage in found) == sorted(ACTIVATIONS)
    for stage in found:
        assert output_shape(stage, (3,)) == (3,)  # the parameters are those of the kernel

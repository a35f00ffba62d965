"""Rules of pointwise functions: the Lipschitz constant is the supremum of |derivative|.

A pointwise function has the same constant in the norms 1, 2 and inf. The constants below are
suprema rounded up to the next float64 (the tests enclose them in higher precision). A function
that jumps has no finite constant; the bound is then inf, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.ops.chain_stages import Activation, Stage
from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF, widened
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import Arguments, Call, Errors, Stages, rule
from lipfast.rules.running_errors import error_of_function, finished
from lipfast.rules.slopes import hull, of_elu, of_prelu, of_rrelu
from lipfast.rules.upward import Upward

# Attained at sqrt(2): Phi(sqrt 2) + sqrt(2) phi(sqrt 2).
GELU = 1.128904145185155
GELU_TANH = 1.128993068658772
SILU = 1.099839320128867
MISH = 1.088498161251728
# scale * alpha, the slope at 0 from the left (Klambauer et al., 2017).
SELU = 1.758099340847377
SIGMOID = 0.25
HARDSIGMOID = math.nextafter(1.0 / 6.0, 1.0)
HARDSWISH = 1.5
# The least slope, near -1.19.
MISH_DOWN = -0.11252612238946256
# 2 / sqrt(pi), the slope at 0.
ERF = 1.1283791670955128

# From this threshold on the jump of torch's softplus, log(1 + exp(-threshold)) / beta, is below
# 2^-24 of the value there: a rounding of float32.
SOFTPLUS_THRESHOLD = 14.0

# Roundings of an error bound itself.
_ROOM = 4


def _activation_stage(name: str, *arguments: tuple[int, str, float]) -> Stages:
    """The stage of a chain with this name, its parameters at these places (with defaults)."""

    def stage(node: Node, shape: tuple[int, ...]) -> Sequence[Activation] | None:
        parameters = tuple(node.number(*argument) for argument in arguments)
        return [Activation(name, parameters)] if all(map(math.isfinite, parameters)) else None

    return stage


def _gelu_stage(node: Node, shape: tuple[int, ...]) -> Sequence[Activation]:
    return [Activation("gelu_tanh" if node.argument(1, "approximate") == "tanh" else "gelu")]


def _elu_stage(node: Node, shape: tuple[int, ...]) -> Sequence[Stage] | None:
    plain = node.number(2, "scale", 1.0) == node.number(3, "input_scale", 1.0) == 1.0
    return _activation_stage("elu", (1, "alpha", 1.0))(node, shape) if plain else None


def _pointwise(
    op: str,
    constant: float | Callable[[Node], float],
    *,
    exact: bool = False,
    offset: float | Callable[[Node], float] = 0.0,
    limit: float | None = None,
    through_zero: bool = True,
    jump: str = "",
    slopes: tuple[float, float] | Callable[[Node], tuple[float, float] | None] | None = None,
    **facts: Any,
) -> None:
    """Register a function whose constant depends on its static arguments only.

    Args:
        op: the ATen op.
        constant: sup |f'|, rounded up.
        exact: float64 evaluates the function without any rounding.
        offset: see `EVALUATION_ROUNDOFFS`.
        limit: sup |f|, if that is finite.
        through_zero: f(0) = 0.
        jump: why there is no constant, where there is none.
        slopes: see `rule`; by default as far down as up. Where there is no constant there are none.
        facts: what `rule` takes besides.
    """

    def value(number: float | Callable[[Node], float], node: Node) -> float:
        return number(node) if callable(number) else number

    def bound(call: Call) -> Upward:
        supremum = value(constant, call.node)
        if math.isinf(supremum):
            why = f"{call.node.op} has no finite Lipschitz constant"
            return call.unbounded(f"{why}: {jump}" if jump else why)
        return call.input * supremum

    def error(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
        x, slope = arguments.value(arguments.node.args[0]), value(constant, arguments.node)
        if exact:
            total = torch.zeros_like(x) if errors[0] is None else errors[0] * slope
        else:
            shift = value(offset, arguments.node)
            total = error_of_function(x, errors[0], output, slope=slope, offset=shift, room=_ROOM)
        if limit is None:
            return total
        # Whatever the operand is: |f(x') - z| <= sup |f| + |z|. Errors of gates stay bounded.
        return torch.minimum(total, widened(output.abs() + abs(limit), _ROOM))

    def magnitude(call: Call) -> Magnitude:
        size = call.magnitudes[0]
        largest = Upward.of(abs(limit)) if limit is not None else Upward(math.inf)
        # |f(x)| <= sup |f'| |x| where f(0) = 0.
        slope = value(constant, call.node) if through_zero else math.inf
        scaled = size.scaled(slope) if math.isfinite(slope) else Magnitude()
        return scaled.tightened(Magnitude(entry=largest))

    def slopes_of(call: Call) -> tuple[float, float] | None:
        supremum = value(constant, call.node)
        if math.isinf(supremum):
            return None
        return slopes(call.node) if callable(slopes) else slopes or (-supremum, supremum)

    facts |= {"error": error, "magnitude": magnitude, "slopes": slopes_of}
    rule(op, supports=one_activation, leading=True, **facts)(bound)


def one_activation(node: Node) -> str | None:
    """Only the first argument may be a tensor, and it must be an activation."""
    tensors = [ref.kind for ref in node.references() if ref.kind != "dtype"]
    return None if tensors == ["node"] else "with more than one tensor argument"


def _leaky_relu_slope(node: Node) -> float:
    return max(1.0, abs(node.number(1, "negative_slope", 0.01)))


def _rrelu_slope(node: Node) -> float:
    """In eval mode a LeakyReLU with the mean of the slopes."""
    lower, upper = node.number(1, "lower", 0.125), node.number(2, "upper", 1.0 / 3.0)
    return max(1.0, math.nextafter(abs(lower + upper) / 2.0, math.inf))


def _elu_slope(node: Node) -> float:
    alpha = node.number(1, "alpha", 1.0)
    scale = node.number(2, "scale", 1.0)
    input_scale = node.number(3, "input_scale", 1.0)
    if input_scale < 0:  # exp grows without bound on the negative side
        return math.inf
    left = Upward.of(abs(alpha)) * input_scale
    return (left.maximum(Upward.of(1.0)) * abs(scale)).value


def _celu_slope(node: Node) -> float:
    return 1.0 if node.number(1, "alpha", 1.0) > 0 else math.inf


def _gelu_slope(node: Node) -> float:
    return GELU_TANH if node.argument(1, "approximate", "none") == "tanh" else GELU


def _evaluate_softsign(arguments: Arguments) -> Tensor:
    x = arguments.value(arguments.node.args[0])
    return x / (x.abs() + 1.0)


def _clamp_points(node: Node) -> tuple[float, ...]:
    limits = node.argument(1, "min"), node.argument(2, "max")
    return tuple(float(value) for value in limits if isinstance(value, (int, float)))


def _kinks(*points: float | tuple[int, str, float]) -> Callable[[Node], tuple[float, ...]]:
    """Breakpoints at numbers, or at arguments (position, name, default)."""
    return lambda node: tuple(p if isinstance(p, float) else node.number(*p) for p in points)


def _of_gelu(node: Node) -> tuple[float, float]:
    """f(x) - f(-x) = x, so that f'(x) + f'(-x) = 1; 1 - c is exact for c in [1/2, 2]."""
    return 1.0 - _gelu_slope(node), _gelu_slope(node)


_RISING = (0.0, 1.0)
_LIMITS = (1, "min_val", -1.0), (2, "max_val", 1.0)


# Functions that only move along pieces of slope 1, -1 or 0.
_piecewise = partial(_pointwise, constant=1.0, exact=True, slopes=_RISING)
_piecewise("aten.relu", breakpoints=_kinks(0.0), stage=_activation_stage("relu"))
_piecewise("aten.relu6", breakpoints=_kinks(0.0, 6.0), limit=6.0, stage=_activation_stage("relu6"))
_piecewise(
    "aten.hardtanh",
    breakpoints=_kinks(*_LIMITS),
    through_zero=False,
    stage=_activation_stage("hardtanh", *_LIMITS),
)
_piecewise("aten.clamp", breakpoints=_clamp_points, through_zero=False)
_piecewise("aten.clamp_min", breakpoints=_kinks((1, "min", 0.0)), through_zero=False)
_piecewise("aten.clamp_max", breakpoints=_kinks((1, "max", 0.0)), through_zero=False)
_piecewise("aten.abs", breakpoints=_kinks(0.0), slopes=(-1.0, 1.0))
_piecewise("aten.neg", slopes=(-1.0, -1.0))
_pointwise(
    "aten.leaky_relu",
    _leaky_relu_slope,
    breakpoints=_kinks(0.0),
    stage=_activation_stage("leaky_relu", (1, "negative_slope", 0.01)),
    slopes=lambda node: hull(1.0, node.number(1, "negative_slope", 0.01)),
)
_pointwise(
    "aten.elu",
    _elu_slope,
    offset=lambda node: 1.0 + _elu_slope(node) * abs(node.number(1, "alpha", 1.0)),
    stage=_elu_stage,
    slopes=of_elu,
)
_pointwise("aten.selu", SELU, offset=2.0, slopes=(0.0, SELU))
_pointwise(
    "aten.celu",
    _celu_slope,
    offset=lambda node: 1.0 + abs(node.number(1, "alpha", 1.0)),
    slopes=_RISING,
)
_pointwise("aten.tanh", 1.0, limit=1.0, stage=_activation_stage("tanh"), slopes=_RISING)
_within_one = partial(_pointwise, offset=1.0, limit=1.0, through_zero=False)
_within_one("aten.sigmoid", SIGMOID, stage=_activation_stage("sigmoid"), slopes=(0.0, SIGMOID))
_within_one(
    "aten.hardsigmoid", HARDSIGMOID, breakpoints=_kinks(-3.0, 3.0), slopes=(0.0, HARDSIGMOID)
)
_within_one("aten.cos", 1.0)
_pointwise("aten.hardswish", HARDSWISH, breakpoints=_kinks(-3.0, 3.0), slopes=(-0.5, HARDSWISH))
_pointwise("aten.gelu", _gelu_slope, stage=_gelu_stage, slopes=_of_gelu)
_pointwise("aten.silu", SILU, stage=_activation_stage("silu"), slopes=(1.0 - SILU, SILU))
_pointwise("aten.mish", MISH, slopes=(MISH_DOWN, MISH))
_pointwise("lipfast.softsign", 1.0, evaluate=_evaluate_softsign, limit=1.0, slopes=_RISING)
_pointwise("aten.log_sigmoid", 1.0, offset=1.0, through_zero=False, slopes=_RISING)
_pointwise("aten.softshrink", 1.0, offset=1.0, slopes=_RISING)
_pointwise("aten.sin", 1.0, limit=1.0)
_pointwise("aten.atan", 1.0, slopes=_RISING)
_pointwise("aten.erf", ERF, limit=1.0, slopes=(0.0, ERF))
_pointwise("aten.rrelu", _rrelu_slope, breakpoints=_kinks(0.0), training=3, slopes=of_rrelu)
_pointwise("aten.hardshrink", math.inf, through_zero=False)
_pointwise(
    "aten.threshold",
    lambda node: 1.0 if _fills_the_threshold(node) else math.inf,
    exact=True,
    through_zero=False,
    jump="it jumps at the threshold, where its value is another: nn.Threshold(t, t) does not",
    slopes=_RISING,
)


def _fills_the_threshold(node: Node) -> bool:
    """Whether ``x if x > t else v`` is ``max(x, t)``."""
    return node.number(1, "threshold", 0.0) == node.number(2, "value", 0.0)


def _prelu_weight(arguments: Arguments) -> Tensor:
    """Return the slopes (networks, 1, channels, 1...), ready to multiply the activation."""
    x = arguments.value(arguments.node.args[0])
    weight = arguments.value(arguments.node.args[1])
    return weight.reshape(weight.shape[0], 1, -1, *[1] * max(0, x.dim() - 3))


def _evaluate_prelu(arguments: Arguments) -> Tensor:
    x = arguments.value(arguments.node.args[0])
    slopes = _prelu_weight(arguments)
    if x.dim() == 2:  # samples that are scalars
        slopes = slopes.squeeze(-1)
    return torch.where(x > 0, x, x * slopes)


def _error_prelu(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    x, weight = (arguments.value(argument) for argument in arguments.node.args[:2])
    off = torch.zeros_like(weight) if errors[1] is None else errors[1]
    ones = [1] * (output.dim() - 1)
    slope = (weight.abs() + off).reshape(len(weight), -1).amax(1).clamp_min(1.0).reshape(-1, *ones)
    moved = off.reshape(len(off), -1).amax(1).reshape(-1, *ones)
    incoming = torch.zeros_like(output) if errors[0] is None else errors[0]
    total = incoming * slope + moved * x.abs() + output.abs() * UNIT_ROUNDOFF
    return finished(total, _ROOM)


def _prelu_supported(node: Node) -> str | None:
    kinds = [ref.kind for ref in node.references()]
    return None if kinds in (["node", "parameter"], ["node", "constant"]) else "computed slopes"


@rule(
    "aten.prelu",
    supports=_prelu_supported,
    evaluate=_evaluate_prelu,
    error=_error_prelu,
    breakpoints=_kinks(0.0),
    parameter_errors="read",
    slopes=of_prelu,
)
def prelu(call: Call) -> Upward:
    """PReLU: ``max(1, max |slope|)``."""
    slopes = call.tensor(call.node.args[1]).detach().double().abs()
    rounding = call.rounding(call.node.args[1])
    if rounding is not None:
        slopes = widened(slopes + rounding, 4)
    return call.input * max(1.0, float(slopes.max()))


def _softplus_options(node: Node) -> tuple[float, float]:
    return node.number(1, "beta", 1.0), node.number(2, "threshold", 20.0)


def _ideal_softplus(node: Node) -> bool:
    """Whether the function is ``log(1 + exp(beta x)) / beta`` for all x; see `softplus`."""
    return _softplus_options(node)[1] >= SOFTPLUS_THRESHOLD


def _has_a_constant(node: Node) -> bool:
    return _ideal_softplus(node) and _softplus_options(node)[0] != 0.0


def _evaluate_softplus(arguments: Arguments) -> Tensor:
    x = arguments.value(arguments.node.args[0])
    beta, threshold = _softplus_options(arguments.node)
    scaled = x * beta
    smooth = torch.logaddexp(scaled, torch.zeros_like(x)) / beta
    return smooth if _ideal_softplus(arguments.node) else torch.where(scaled > threshold, x, smooth)


def _error_softplus(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """The error of a function of slope 1; inf where rounding may choose the other branch."""
    x = arguments.value(arguments.node.args[0])
    beta, threshold = _softplus_options(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    offset = 1.0 / abs(beta) if beta else math.inf
    total = error_of_function(x, errors[0], output, slope=1.0, offset=offset, room=_ROOM)
    if _ideal_softplus(arguments.node):
        return total
    scaled = x * beta
    near = widened(incoming * abs(beta) + scaled.abs() * (4 * UNIT_ROUNDOFF), _ROOM)
    sure = (scaled - threshold).abs() > near + abs(threshold) * (4 * UNIT_ROUNDOFF) + UNDERFLOW
    return torch.where(sure, total, math.inf)


@rule(
    "aten.softplus",
    supports=one_activation,
    evaluate=_evaluate_softplus,
    error=_error_softplus,
    leading=True,
    stage=_activation_stage("softplus", (1, "beta", 1.0), (2, "threshold", 20.0)),
    slopes=lambda call: _RISING if _has_a_constant(call.node) else None,
)
def softplus(call: Call) -> Upward:
    """``log(1 + exp(beta x)) / beta``: 1, where the threshold is at least `SOFTPLUS_THRESHOLD`.

    torch returns x itself where beta x exceeds the threshold, and so jumps there. From
    `SOFTPLUS_THRESHOLD` on (torch's own is 20) the jump is less than a rounding of float32, and the
    function that is bounded has none. Below, it is torch's, which has no finite constant.
    """
    beta, threshold = _softplus_options(call.node)
    if beta == 0.0:
        return call.unbounded(f"{call.node.op} with beta = 0 has no finite Lipschitz constant")
    if not _ideal_softplus(call.node):
        return call.unbounded(
            f"{call.node.op} jumps at its threshold {threshold:g}, so it has no finite Lipschitz "
            f"constant; from a threshold of {SOFTPLUS_THRESHOLD:g} on the jump is within rounding"
        )
    return call.input

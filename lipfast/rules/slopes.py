"""Ranges of slopes: between which numbers all difference quotients of an op lie, entry by entry.

Part of the proof of every bound that knows signs: lower ends are rounded down and upper ends up.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.rules.registry import Call, SlopeRange


def hull(*slopes: float | Fraction) -> tuple[float, float] | None:
    """From the least to the largest of some numbers; None where one is beyond float64.

    Example:
        >>> hull(0.0, Fraction(1, 3)) == (0.0, math.nextafter(1 / 3, 1))
        True
    """
    try:
        exact = [Fraction(slope) for slope in slopes]
        low, high = float(min(exact)), float(max(exact))
    except (OverflowError, ValueError):  # inf, NaN
        return None
    low = low if Fraction(low) <= min(exact) else math.nextafter(low, -math.inf)
    high = high if Fraction(high) >= max(exact) else math.nextafter(high, math.inf)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def of_elu(node: Node) -> tuple[float, float] | None:
    """``c`` on the right, ``c alpha i exp(i x)`` on the left: of one sign, and 0 far away."""
    numbers = [node.number(*place) for place in ((1, "alpha", 1.0), (2, "scale", 1.0))]
    numbers.append(node.number(3, "input_scale", 1.0))
    if not all(map(math.isfinite, numbers)) or numbers[2] < 0:
        return None
    alpha, scale, input_scale = map(Fraction, numbers)
    return hull(0.0, scale, scale * alpha * input_scale)


def of_rrelu(node: Node) -> tuple[float, float] | None:
    """In eval mode a LeakyReLU with the mean of the slopes."""
    ends = node.number(1, "lower", 0.125), node.number(2, "upper", 1.0 / 3.0)
    if not all(map(math.isfinite, ends)):
        return None
    return hull(1.0, sum(map(Fraction, ends)) / 2)


def of_prelu(call: Call) -> SlopeRange | None:
    """1 and the slope of the channel."""
    ends = left_of_prelu(call)
    return None if ends is None else (ends[0].clamp_max(1.0), ends[1].clamp_min(1.0))


def left_of_prelu(call: Call) -> tuple[Tensor, Tensor] | None:
    """The slopes for numbers below 0: of the channel, which is the first axis of a sample."""
    ends = _enclosed(call, call.node.args[1])
    if ends is None:
        return None
    sample = call.operand_shapes[0]
    shape = (-1, *[1] * (len(sample) - 1)) if sample else ()
    return ends[0].reshape(shape), ends[1].reshape(shape)


def _enclosed(call: Call, argument: Argument) -> tuple[Tensor, Tensor] | None:
    """Between which numbers a parameter lies, which may be computed; None: not all are finite."""
    value = call.tensor(argument).detach().double()
    rounding = call.rounding(argument)
    if rounding is None:
        return (value, value) if _all(value.isfinite()) else None
    return _outwards(value - rounding, value + rounding)


def _all(true: Tensor) -> bool:
    """On a device nobody looks, for which the host would wait: what is no range stays NaN there."""
    return not true.is_cpu or bool(true.all())


def _outwards(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """Ends of one rounding, rounded outwards; None where they are none."""
    infinity = torch.full_like(low, math.inf)
    low, high = torch.nextafter(low, -infinity), torch.nextafter(high, infinity)
    ordered = low.isfinite() & high.isfinite() & (low <= high)
    return (low, high) if _all(ordered) else None


def _constant_beside(call: Call) -> Argument | None:
    """What is combined with one activation that keeps its shape; None where there is no such."""
    first, second = call.node.args[:2]
    kinds = [value.kind if isinstance(value, Reference) else "number" for value in (first, second)]
    if kinds.count("node") != 1:
        return None
    tensors = [kind for kind in kinds if kind != "number"]
    if tuple(call.operand_shapes[tensors.index("node")]) != tuple(call.node.shape):
        return None
    return second if kinds[0] == "node" else first


def of_sum(call: Call) -> SlopeRange | None:
    """What a sum multiplies its activation by, where all else in it is constant."""
    if _constant_beside(call) is None:
        return None
    first = call.node.args[0]
    alpha = call.node.number(2, "alpha", 1.0)
    varies = isinstance(first, Reference) and first.kind == "node"
    scaled = {"aten.add": (1.0, alpha), "aten.sub": (1.0, -alpha), "aten.rsub": (-alpha, 1.0)}
    return hull(scaled[call.node.op][0 if varies else 1])


def of_scaling(call: Call) -> SlopeRange | None:
    """A number, or the entries of a parameter or a constant; of a quotient their reciprocals."""
    other = _constant_beside(call)
    divides = call.node.op == "aten.div"
    if isinstance(other, Reference):
        ends = _of_one_sample(_enclosed(call, other), len(call.node.shape))
        return _reciprocals(*ends) if divides and ends is not None else ends
    number = float(other) if isinstance(other, (bool, int, float)) else math.nan
    if not divides:
        return hull(number)
    return hull(1 / Fraction(number)) if number and math.isfinite(number) else None


def _of_one_sample(
    ends: tuple[Tensor, Tensor] | None, dimensions: int
) -> tuple[Tensor, Tensor] | None:
    """Without dimensions of one in the place of the samples; None where there are others."""
    if ends is None:
        return None
    extra = max(0, ends[0].dim() - dimensions)
    if any(size != 1 for size in ends[0].shape[:extra]):
        return None
    low, high = (end.reshape(end.shape[extra:]) for end in ends)
    return low, high


def _reciprocals(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    one_sign = (low > 0) | (high < 0)
    if not _all(one_sign):
        return None
    return _outwards(1.0 / high, torch.where(one_sign, 1.0 / low, math.nan))

"""Rules of what attention is made of: softmax and its kin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.plan.graph import Node
from lipfast.rules.pointwise import EVALUATION_ROUNDOFFS
from lipfast.rules.pooling import power
from lipfast.rules.registry import Arguments, Call, rule
from lipfast.rules.rounding import UNDERFLOW, UNIT_ROUNDOFF
from lipfast.rules.upward import Upward


def _over_entries(node: Node) -> str | None:
    dimensions = node.dimensions(1, "dim")
    return "over the samples" if not dimensions or 0 in dimensions else None


def _axes(node: Node) -> list[int]:
    """The dimensions of (networks, samples, *shape) that are taken together."""
    return [dim + 1 for dim in node.dimensions(1, "dim")]


def _count(call: Call) -> int:
    shape = call.operand_shapes[0]
    return math.prod(shape[dim - 1] for dim in call.node.dimensions(1, "dim"))


def _roundings(x: Tensor, axes: list[int]) -> Tensor:
    """Unit roundoffs in ``exp(x - max)`` and in sums of them, as torch evaluates them.

    ``x - max`` is rounded, which the exponential turns into a relative error; the exponential has
    `EVALUATION_ROUNDOFFS` (assumed), a sum of n terms n more.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    span = (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)).clamp_max(800.0)
    return span + (2.0 * EVALUATION_ROUNDOFFS + count + 8)


def _error_softmax(arguments: Arguments, errors: Sequence[Tensor | None], output: Tensor) -> Tensor:
    x, axes = arguments.value(arguments.node.args[0]), _axes(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    rounding = output * (2 * UNIT_ROUNDOFF) * _roundings(x, axes)
    total = 0.5 * incoming.amax(axes, keepdim=True) + rounding
    return total * (1.0 + 16 * UNIT_ROUNDOFF) + UNDERFLOW


@rule("aten.softmax", supports=_over_entries, error=_error_softmax)
def softmax(call: Call) -> Upward:
    """1/2 for p = 1, 2 and inf.

    The Jacobian ``diag(s) - s s^T`` is symmetric; its rows sum to ``2 s_i (1 - s_i) <= 1/2`` in
    magnitude, which bounds the norms 1 and inf and, between them, 2. (Over a single entry: 0.)
    """
    return call.input * (0.0 if _count(call) == 1 else 0.5)


def _error_log_softmax(
    arguments: Arguments, errors: Sequence[Tensor | None], output: Tensor
) -> Tensor:
    x, axes = arguments.value(arguments.node.args[0]), _axes(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    size = x.abs().amax(axes, keepdim=True) + output.abs() + 1.0
    rounding = size * (4 * UNIT_ROUNDOFF) * _roundings(x, axes)
    total = incoming + incoming.amax(axes, keepdim=True) + rounding
    return total * (1.0 + 16 * UNIT_ROUNDOFF) + UNDERFLOW


@rule("aten.log_softmax", supports=_over_entries, error=_error_log_softmax)
def log_softmax(call: Call) -> Upward:
    """Over K >= 2 entries ``sqrt(K)`` for p = 2, 2 for p = inf, K - 1 for p = 1.

    The Jacobian is ``I - 1 s^T`` with ``1^T s = 1``. Row i sums to ``2 (1 - s_i)``, column j to
    ``1 + (K - 2) s_j``. As a projection that is neither 0 nor I it has the norm of its complement,
    ``||1 s^T|| = sqrt(K) ||s|| <= sqrt(K)``.
    """
    count = _count(call)
    if count == 1:
        return Upward.of(0.0)
    if math.isinf(call.norm):
        return call.input * 2.0
    return call.input * (power(count, 2) if call.norm == 2 else Upward.of(float(count - 1)))


def _error_logsumexp(
    arguments: Arguments, errors: Sequence[Tensor | None], output: Tensor
) -> Tensor:
    x, axes = arguments.value(arguments.node.args[0]), _axes(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    size = x.abs().amax(axes, keepdim=True) + 1.0
    rounding = size * (4 * UNIT_ROUNDOFF) * _roundings(x, axes)
    total = (incoming.amax(axes, keepdim=True) + rounding).reshape(output.shape)
    return (total + output.abs() * (4 * UNIT_ROUNDOFF)) * (1.0 + 16 * UNIT_ROUNDOFF) + UNDERFLOW


@rule("aten.logsumexp", supports=_over_entries, error=_error_logsumexp)
def logsumexp(call: Call) -> Upward:
    """1 in every norm: the gradient is a softmax, of non-negative entries that sum to 1."""
    return call.input

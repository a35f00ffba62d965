"""Rules of operations that move or add activations: reshape, flatten, sums of branches, scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.plan.graph import Argument, Node, Reference
from lipfast.rules.registry import Arguments, Call, rule
from lipfast.rules.rounding import UNDERFLOW, UNIT_ROUNDOFF
from lipfast.rules.upward import Upward


def _evaluate_reshape(arguments: Arguments) -> Tensor:
    x = arguments.value(arguments.node.args[0])
    return x.reshape(*x.shape[:2], *arguments.node.shape)


def _error_reshape(arguments: Arguments, errors: Sequence[Tensor | None], output: Tensor) -> Tensor:
    return torch.zeros_like(output) if errors[0] is None else errors[0].reshape(output.shape)


def _reshape_supported(node: Node) -> str | None:
    kinds = {ref.kind for ref in node.references()}
    return None if kinds <= {"node", "batch"} else "reinterprets the bits of its input"


@rule(
    "aten.flatten",
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.unflatten",
    "aten.squeeze",
    "aten.unsqueeze",
    supports=_reshape_supported,
    evaluate=_evaluate_reshape,
    error=_error_reshape,
)
def reshape(call: Call) -> Upward:
    """Keep the norm: a reshape of every sample has the constant 1.

    The traced shapes keep the sample dimension in front and its number of entries, and elements
    keep their order: so samples are never mixed.
    """
    return call.input


def _alpha(node: Node) -> float:
    return node.number(2, "alpha", 1.0)


def _copies(call: Call, position: int) -> Upward:
    """How much broadcasting one operand to the result's shape multiplies its norm."""
    size = math.prod(call.operand_shapes[position])
    copies = Upward.of(max(1.0, math.prod(call.node.shape) / max(1, size)))
    if math.isinf(call.norm):
        return Upward.of(1.0)
    return copies if call.norm == 1 or copies == Upward.of(1.0) else copies.square_root()


def _aligned(arguments: Arguments, argument: Argument) -> Tensor | float:
    """Return an operand of a broadcasting op, its sample dimensions aligned from the right."""
    if isinstance(argument, (bool, int, float)):
        return float(argument)
    value = arguments.value(argument)
    leading = 2 if isinstance(argument, Reference) and argument.kind == "node" else 1
    ones = [1] * max(0, len(arguments.node.shape) + 2 - value.dim())
    return value.reshape(*value.shape[:leading], *ones, *value.shape[leading:])


def _evaluate_sum(arguments: Arguments) -> Tensor:
    node = arguments.node
    first = _aligned(arguments, node.args[0])
    second = _aligned(arguments, node.args[1])
    sign = -1.0 if node.op == "aten.sub" else 1.0
    return torch.as_tensor(first + (sign * _alpha(node)) * second)


def _error_sum(arguments: Arguments, errors: Sequence[Tensor | None], output: Tensor) -> Tensor:
    node = arguments.node
    remaining = iter(errors)
    total = output.abs() * UNIT_ROUNDOFF
    for factor, argument in zip((1.0, abs(_alpha(node))), node.args[:2], strict=True):
        if factor != 1.0:  # the product alpha y is rounded too
            # In this order: 2 u alpha may underflow where u |alpha y| does not.
            product = torch.as_tensor(_aligned(arguments, argument)).abs() * factor
            total = total + product * (2 * UNIT_ROUNDOFF)
        error = next(remaining) if isinstance(argument, Reference) else None
        if error is not None:
            total = total + error * factor
    return total * (1.0 + 16 * UNIT_ROUNDOFF) + UNDERFLOW


@rule("aten.add", "aten.sub", evaluate=_evaluate_sum, error=_error_sum)
def add(call: Call) -> Upward:
    """``L(x + alpha y) = L(x) + |alpha| L(y)``; constants add nothing (residual: 1 + branch).

    A broadcast activation counts as often as it is copied: ``sqrt(copies)`` for norm 2,
    ``copies`` for norm 1.
    """
    total, position = Upward.of(0.0), 0
    for factor, argument in zip((1.0, abs(_alpha(call.node))), call.node.args[:2], strict=True):
        if isinstance(argument, Reference):
            total = total + call.operands[position] * factor * _copies(call, position)
            position += 1
    return total


def _scale_supported(node: Node) -> str | None:
    nodes = [
        value for value in node.args[:2] if isinstance(value, Reference) and value.kind == "node"
    ]
    if len(nodes) > 1:
        return "a product or quotient of two activations"
    if node.op == "aten.div":
        if not nodes or node.args[0] is not nodes[0]:
            return "division by an activation"
        if node.argument(2, "rounding_mode") is not None:
            return "division that rounds"
    return None


def _other(node: Node) -> Argument:
    first, second = node.args[:2]
    return second if isinstance(first, Reference) and first.kind == "node" else first


def _evaluate_scale(arguments: Arguments) -> Tensor:
    node = arguments.node
    first, second = (_aligned(arguments, value) for value in node.args[:2])
    return torch.as_tensor(first / second if node.op == "aten.div" else first * second)


def _error_scale(arguments: Arguments, errors: Sequence[Tensor | None], output: Tensor) -> Tensor:
    node = arguments.node
    other = _aligned(arguments, _other(node))
    factor = torch.as_tensor(other, dtype=output.dtype, device=output.device).abs()
    total = output.abs() * UNIT_ROUNDOFF
    for error in errors:
        if error is not None:  # dividing: the reciprocal of a factor may be denormal, or inf
            total = total + (error / factor if node.op == "aten.div" else error * factor)
    return total * (1.0 + 16 * UNIT_ROUNDOFF) + UNDERFLOW


@rule(
    "aten.mul",
    "aten.div",
    supports=_scale_supported,
    evaluate=_evaluate_scale,
    error=_error_scale,
)
def scale(call: Call) -> Upward:
    """Multiplication by a constant or a parameter: its largest absolute entry.

    Division: the reciprocal of the smallest absolute entry.
    """
    other = _other(call.node)
    if isinstance(other, (bool, int, float)):
        largest = smallest = abs(float(other))
    else:
        entries = call.tensor(other).detach().abs().double()
        largest, smallest = float(entries.max()), float(entries.min())
    if call.node.op == "aten.div":
        if smallest == 0.0:
            return call.unbounded(f"{call.node} divides by zero")
        largest = math.nextafter(1.0 / smallest, math.inf)
    position = next(
        index
        for index, value in enumerate(v for v in call.node.args[:2] if isinstance(v, Reference))
        if value.kind == "node"
    )
    return call.operands[position] * largest * _copies(call, position)

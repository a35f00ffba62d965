"""Rules of functions that are steep somewhere: exponentials, logarithms, roots, reciprocals.

Alone they have no finite constant. As a part of a function of one variable they may, and are then
bounded with it (`compositions`); what is here is how they are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.rounding import UNIT_ROUNDOFF, widened
from lipfast.rules.pointwise import one_activation
from lipfast.rules.registry import Arguments, Call, Errors, rule
from lipfast.rules.running_errors import EVALUATION_ROUNDOFFS, finished
from lipfast.rules.upward import Upward

# (least, largest) that the operand can be -> (largest |f'| between them, whether f is defined).
Slope = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor | bool]"]


def _error_of_steep(slope: Slope, arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """``sup |f'| e`` within e of the operand; inf where f may not be defined."""
    x = arguments.value(arguments.node.args[0])
    error = torch.zeros_like(x) if errors[0] is None else errors[0]
    room = widened(error, 2) + x.abs() * (2 * UNIT_ROUNDOFF)
    steepest, inside = slope(x - room, x + room)
    moved = torch.where(error > 0, error * steepest * (1.0 + 2.0**-20), 0.0)
    if inside is not True:
        moved = torch.where(torch.as_tensor(inside) | (error == 0), moved, math.inf)
    rounding = (x.abs() + output.abs() + 1.0) * (EVALUATION_ROUNDOFFS * UNIT_ROUNDOFF)
    return finished(moved + rounding, 16)


def _unbounded(call: Call) -> Upward:
    """inf: the function is as steep as you like."""
    return call.unbounded(f"{call.node.op} has no finite Lipschitz constant")


def _steep(op: str, slope: Slope, refused: str | None = None) -> None:
    """Register a function by its slope; alone it is `refused` with this reason."""

    def supports(node: Node) -> str | None:
        return one_activation(node) or refused

    facts = partial(rule, supports=supports, error=partial(_error_of_steep, slope), leading=True)
    facts(op, product=lambda node: True)(_unbounded)


def _distance_to_zero(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(low, -high)


_NEAR_ZERO = "of an activation that may come near to 0"
_steep("aten.exp", lambda low, high: (high.exp(), True))
_steep("aten.expm1", lambda low, high: (high.exp(), True))
_steep("aten.square", lambda low, high: (2 * torch.maximum(high.abs(), low.abs()), True))
_steep("aten.log", lambda low, high: (1 / low, low > 0), _NEAR_ZERO)
_steep("aten.log1p", lambda low, high: (1 / (1 + low), low > -1), "of an activation that may be -1")
_steep("aten.sqrt", lambda low, high: (0.5 / low.sqrt(), low > 0), _NEAR_ZERO)
_steep("aten.rsqrt", lambda low, high: (0.5 * low**-1.5, low > 0), _NEAR_ZERO)
_steep(
    "aten.reciprocal",
    lambda low, high: (_distance_to_zero(low, high) ** -2.0, _distance_to_zero(low, high) > 0),
    "division by an activation",
)

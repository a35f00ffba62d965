"""The rule of gated linear units."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.norms import dual_norm
from lipfast.rounding import UNIT_ROUNDOFF, widened
from lipfast.rules.pointwise import SIGMOID
from lipfast.rules.products import ADVICE, error_of_product
from lipfast.rules.registry import Arguments, Call, Dimensions, Errors, rule
from lipfast.rules.running_errors import error_of_function
from lipfast.rules.upward import Upward, p_norm


def _halves_within(node: Node) -> str | None:
    return "over the samples" if 0 in node.dimensions(1, "dim") else None


def _error_glu(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    axis = arguments.node.dimensions(1, "dim")[0] + 1
    a, b = arguments.value(arguments.node.args[0]).chunk(2, axis)
    first, second = (None, None) if errors[0] is None else errors[0].chunk(2, axis)
    gate = torch.sigmoid(b)
    opened = error_of_function(b, second, gate, slope=SIGMOID, offset=1.0, room=4)
    opened = torch.minimum(opened, widened(gate + 1.0, 4))
    product = error_of_product(a, gate, (first, opened), output)
    # The op rounds the gate and the product in an order of its own.
    return product + widened(output.abs() * (4 * UNIT_ROUNDOFF), 4)


@rule(
    "aten.glu",
    supports=_halves_within,
    dimensions=Dimensions({1: "dim"}, default=-1),
    product=lambda node: True,
    error=_error_glu,
    magnitude=lambda call: call.magnitudes[0],
    leading=True,
)
def gated(call: Call) -> Upward:
    """``a sigmoid(b)`` of halves a and b, ``|a| <= A``: the dual norm of (1, A / 4).

    ``|d(a s)| <= |da| + A/4 |db|`` for every entry: 1 + A/4 for p = inf, ``sqrt(1 + A^2/16)`` for
    p = 2, the larger of 1 and A/4 for p = 1.
    """
    parts = [Upward.of(1.0), call.magnitudes[0].entry * SIGMOID]
    if parts[1].unbounded:
        return call.unbounded(f"{call.node.op}: {ADVICE}")
    return call.input * p_norm(parts, dual_norm(call.norm))

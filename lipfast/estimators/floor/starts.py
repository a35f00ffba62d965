"""The slopes that units have at inputs: patterns that are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.floor.linear_graph import LinearGraph, Units
from lipfast.plan.architecture import Architecture
from lipfast.plan.interpret import walk


def slopes_at(
    plan: Architecture,
    linear: LinearGraph,
    parameters: Mapping[str, Tensor],
    ends: Sequence[tuple[Tensor, Tensor]],
    points: Sequence[Tensor],
) -> list[Tensor]:
    """Slopes of all units at inputs, moved between their ends: (N, S, *shape) each.

    Where autograd knows none they are the upper ends.

    Args:
        plan: the architecture.
        linear: its linear graph.
        parameters: of the networks, stacked in float64.
        ends: of the slopes.
        points: per input (N, S, *shape).
    """
    with torch.enable_grad():
        leaves = [point.detach().double().clone().requires_grad_() for point in points]
        values = walk(plan.graph, parameters, plan.constants, leaves, keep=True)
        found = []
        for unit, (low, high) in zip(linear.units, ends, strict=True):
            slopes = _derivative(unit, linear, values)
            slopes = torch.where(torch.isfinite(slopes), slopes, high)
            found.append(slopes.clamp(low, high))
    return found


def _derivative(unit: Units, linear: LinearGraph, values: Mapping[str, Tensor]) -> Tensor:
    """The derivative of an activation, entry by entry."""
    source, result = values.get(unit.source), values.get(unit.name)
    if source is None:  # a ReLU of the difference that an extremum is made of
        operands = linear.known.node(unit.source).names("node")
        shape = next(iter(values.values())).shape[:2]
        if len(operands) != 2:
            return torch.full((*shape, *unit.shape), torch.nan, dtype=torch.float64)
        return (values[operands[0]].detach() > values[operands[1]].detach()).double()
    if result is None or not result.requires_grad:
        return torch.full_like(source, torch.nan)
    total = result.sum()
    (slopes,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
    return torch.full_like(source, torch.nan) if slopes is None else slopes.detach()

"""The slopes that units have at inputs: patterns that are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.floor.linear_graph import LinearGraph, PatternUnits
from lipfast.ops.fetched import sent
from lipfast.plan.architecture import Architecture
from lipfast.plan.interpret import NodeArguments, walk


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
            slopes = _derivative(unit, linear, parameters, values)
            slopes = torch.where(torch.isfinite(slopes), slopes, high)
            found.append(slopes.clamp(low, high))
    return found


def _derivative(
    unit: PatternUnits,
    linear: LinearGraph,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Tensor:
    """The derivative of an activation, entry by entry."""
    source, result = values.get(unit.source), values.get(unit.name)
    if source is None:
        return (read_by(unit, linear, parameters, values).detach() > 0).double()
    if result is None or not result.requires_grad:
        return torch.full_like(source, torch.nan)
    total = result.sum()
    (slopes,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
    return torch.full_like(source, torch.nan) if slopes is None else slopes.detach()


def read_by(
    unit: PatternUnits,
    linear: LinearGraph,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Tensor:
    """What an activation reads, from the values of all nodes of the architecture."""
    if unit.source in values:
        return values[unit.source]
    # The difference that an extremum's ReLU reads.
    node = linear.known.node(unit.source)
    constants = {name: linear.plan.constants[name].tensor() for name in node.names("constant")}
    like = next(iter(values.values()))
    typed = {name: sent(own.to(like.dtype), like.device) for name, own in constants.items()}
    return NodeArguments(node, values, parameters, typed).replaced({}, {})

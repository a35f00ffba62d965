"""Evaluation in float64 with an elementwise bound of the rounding error.

Running error analysis (Higham, 2002, sec. 3.3): every node's result comes with a bound of its
distance to what real arithmetic would give. Part of the proof of every certified lower bound, and
of upper bounds on a domain. The assumptions are those of
`lipfast.estimators.lower.secants`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.errors import naming
from lipfast.graph.nodes import error_name
from lipfast.ops.emulation import products_are_ieee
from lipfast.plan.architecture import Architecture
from lipfast.plan.interpret import NodeArguments, joined_outputs, walk
from lipfast.rounding import UNDERFLOW, widened
from lipfast.rules.registry import RULES


def missing_error_rules(plan: Architecture) -> list[str]:
    """Ops that have no rule for rounding errors: nothing can be certified through them."""
    ops = [node.op for node in plan.graph.nodes if node.op != "input"]
    return sorted({op for op in ops if op in RULES and RULES[op].error is None})


def enclose(
    plan: Architecture, parameters: Mapping[str, Tensor], points: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate stored float64 points with an elementwise bound of their error.

    Args:
        plan: the architecture.
        parameters: stacked, float64.
        points: (networks, C, *shape), float64, taken as exact.

    Returns:
        Outputs and error bounds, (networks, C, K) each: the output in real arithmetic is within
        the error bound of the computed one.
    """
    values, errors = enclose_nodes(plan, parameters, [points], keep=False)
    return joined_outputs(plan.graph, values), joined_outputs(plan.graph, errors)


def enclose_nodes(
    plan: Architecture,
    parameters: Mapping[str, Tensor],
    points: Sequence[Tensor],
    *,
    keep: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and error bounds of all nodes (without `keep`, of the outputs), for several inputs."""
    errors: dict[str, Tensor] = {}
    masked = plan.requirements.hides_entries or bool(plan.requirements.masks)

    def visit(arguments: NodeArguments, output: Tensor) -> None:
        if not keep:  # errors live as long as the values that they belong to
            for name in errors.keys() - set(arguments.live):
                del errors[name]
        errors[arguments.node.name] = node_error(
            arguments, parameters, errors, output, masked=masked
        )

    # Running errors hold for sums of products in any order, not for transforms (Fourier, Winograd).
    with torch.backends.cudnn.flags(enabled=False):
        values = walk(plan.graph, parameters, plan.constants, points, visit, keep=keep)
    for node, value in zip(plan.graph.inputs, points, strict=True):
        errors[node.name] = torch.zeros_like(value)
    return values, errors


def node_error(
    arguments: NodeArguments,
    parameters: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    output: Tensor,
    *,
    masked: bool = True,
) -> Tensor:
    """Elementwise error of one node's result, from the errors of its operands.

    Args:
        arguments: the operands, as computed.
        parameters: stacked, float64, with the errors of those that are computed.
        errors: of the operands by node name; what is missing is exact.
        output: the computed result.
        masked: whether an architecture may hide entries by -inf.

    Returns:
        Bounds like `output`; inf where it is not finite, but for what a mask hides, and everywhere
        on a device that emulates float64.
    """
    if output.is_cuda and not products_are_ieee(output.device):
        return torch.full_like(output, math.inf)
    node = arguments.node
    rule = RULES[node.op]
    reads = rule.parameter_errors == "read"
    incoming = [
        errors.get(reference.name)
        if reference.kind == "node"
        else (parameters.get(error_name(reference.name)) if reads else None)
        for reference in node.references()
        if reference.kind in ("node", "parameter", "constant")
    ]
    assert rule.error is not None
    with naming(node.op, node.module):
        error = rule.error(arguments, incoming, output)
        if not reads:
            error = error + _error_of_parameters(arguments, parameters, errors)
    # An overflow, perhaps of a partial sum only, is not a number near the truth.
    known = torch.isfinite(output) & ~torch.isnan(error)
    # Only what a mask hides is -inf and exact. A look at a device would make the host wait.
    if masked and (output.is_cuda or not bool(known.all())):
        known |= (output == -math.inf) & (error == 0) & _holds_a_mask(arguments, incoming)
    return torch.where(known, error, math.inf)


def _holds_a_mask(arguments: NodeArguments, errors: Sequence[Tensor | None]) -> bool | Tensor:
    """Whether an operand is -inf without an error: a constant, or what one was added to."""
    if -math.inf in arguments.node.args:
        return True
    found: bool | Tensor = False
    tensors = [ref for ref in arguments.node.references() if ref.kind not in ("batch", "dtype")]
    for reference, error in zip(tensors, errors, strict=True):
        hidden = arguments.value(reference) == -math.inf
        if error is not None:
            hidden &= error == 0
        found = hidden.any() | found
    return found


def _error_of_parameters(
    arguments: NodeArguments, parameters: Mapping[str, Tensor], errors: Mapping[str, Tensor]
) -> Tensor | float:
    """What rounding errors E of computed parameters add: the op of ``|x| + e`` and E.

    For ops that are linear in their parameters and in x: ``|(W + E) x - W x| <= |E| |x|``.
    """
    node = arguments.node
    named = [ref.name for ref in node.references() if ref.kind == "parameter"]
    bounds = {name: parameters.get(error_name(name)) for name in named}
    rounded = [bound for bound in bounds.values() if bound is not None]
    if not any(bound.is_cuda or bool(bound.any()) for bound in rounded):
        return 0.0
    changed = {
        name: torch.zeros_like(parameters[name]) if bound is None else bound
        for name, bound in bounds.items()
    }
    added = RULES[node.op].parameter_errors == "added"
    inputs = {}
    for ref in node.references():
        if ref.kind == "node":
            value = arguments.value(ref).abs() + errors.get(ref.name, 0.0)
            inputs[ref.name] = torch.zeros_like(value) if added else value
    total = arguments.replaced(inputs, changed).abs()
    terms = max(bound[0].numel() for bound in changed.values())
    return widened(total, terms + 16) + UNDERFLOW

"""Evaluation in float64 with a bound of the norm of the rounding error, for deep networks.

Part of the proof of certified lower bounds, where errors are bounded in norm.

Elementwise bounds pass through a layer as ``|W| e``, and ``|W|`` stretches sqrt(fan-in) times more
than W: after some ten layers they say nothing. Norms pass as ``||W|| E``. Let x^ be the computed
operand of a node g, at most E from the exact x, and y^ the computed result. Then

    ``||y^ - g(x)|| <= ||y^ - g(x^)|| + ||g(x^) - g(x)|| <= r + L E``

where r is the norm of the elementwise error bound for exact operands (running error analysis,
Higham, 2002, sec. 3.3) and L the node's Lipschitz constant, from the rules and the certified norms
of the layers: the sweep of the upper bound, with errors in place of constants. Always in norm 2:
sums of the entries' magnitudes, norms 1 and inf, stretch as much as ``|W|`` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.enclosure import node_error
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.layer_calls import LayerCall, layer_brackets
from lipfast.estimators.upper.sweep import ZERO, Step, sweep_of
from lipfast.plan.architecture import Architecture
from lipfast.plan.interpret import NodeArguments, joined_outputs, walk
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import stack
from lipfast.rounding import gamma
from lipfast.rules.upward import Upward, p_norm

_RTOL = 0.1  # of the layers' norms: an error ten per cent larger costs nothing


def layer_norms(plan: Architecture, tensors: Mapping[str, Tensor]) -> tuple[LayerBracket, ...]:
    """Certified spectral norms of the layers of one network, not merged, not tight."""
    layers = sweep_of(plan, plan.unfolded).layers
    found, _ = layer_brackets(
        LayerCall(layers, ResolvedNetworks([dict(tensors)]), 2, _RTOL, 0, [{}])
    )
    return found.of(0)


def output_error_norms(
    plan: Architecture,
    tensors: Mapping[str, Tensor],
    layers: Sequence[LayerBracket],
    points: Tensor,
) -> tuple[Tensor, Tensor]:
    """Evaluate stored float64 points of one network with a bound of the norm of their error.

    Args:
        plan: the architecture; every op must have an error rule.
        tensors: checked parameters of the network.
        layers: its `layer_norms`.
        points: (1, C, *shape), float64, taken as exact.

    Returns:
        Outputs (1, C, K), and errors (1, C): the output in real arithmetic is within that distance
        of the computed one, in norm 2; inf where nothing can be said.
    """
    parameters = stack([tensors], plan.used_parameters, torch.float64)
    steps = {step.node.name: step for step in sweep_of(plan, plan.unfolded).steps}
    norms = [layer.upper if layer.certified else math.inf for layer in layers]
    count = points.shape[1]
    known = {node.name: [ZERO] * count for node in plan.graph.inputs}

    def operands(step: Step, point: int) -> list[Upward]:
        return [ZERO if name is None else known[name][point] for name in step.names]

    def visit(arguments: NodeArguments, output: Tensor) -> None:
        step = steps[arguments.node.name]
        if step.rule.product is not None and step.rule.product(step.node):
            # Its constant holds within a domain, where x^ need not be.
            spread = {
                name: _like_operand(known[name], arguments.of_node(name))
                for name in step.operation.operands
            }
            known[step.node.name] = _norm_of_each(node_error(arguments, parameters, spread, output))
            return
        own = _norm_of_each(node_error(arguments, parameters, {}, output))
        # L E: what the node makes of the errors of its operands.
        known[step.node.name] = [
            error + step.bound(step.call(operands(step, i), norms, tensors, plan.constants, 2))
            for i, error in enumerate(own)
        ]

    # Running errors hold for sums of products in any order, not for transforms (Fourier, Winograd).
    with torch.backends.cudnn.flags(enabled=False):
        values = walk(plan.graph, parameters, plan.constants, [points], visit)
    total = [p_norm([known[name][i] for name in plan.graph.outputs], 2) for i in range(count)]
    errors = points.new_tensor([[error.value for error in total]])
    return joined_outputs(plan.graph, values), errors


def _like_operand(errors: Sequence[Upward], value: Tensor) -> Tensor:
    """An elementwise bound like the operand (1, C, *shape): no entry exceeds the norm."""
    column = value.new_tensor([error.value for error in errors])
    shape = (1, -1, *[1] * (value.dim() - 2))
    return column.reshape(shape).expand_as(value).clone()


def _norm_of_each(errors: Tensor) -> list[Upward]:
    """Norms of elementwise bounds (1, C, *shape), rounded up; inf where one is not finite."""
    flat = errors.reshape(errors.shape[1], -1)
    if not flat.shape[1]:
        return [ZERO] * len(flat)
    peak = flat.amax(1, keepdim=True)
    # Divided by the largest, no square that matters underflows.
    scaled = flat / torch.where(peak > 0, peak, 1.0)
    sizes = scaled.square().sum(1).sqrt() * (1.0 + gamma(flat.shape[1] + 16)) + 2.0**-500
    pairs = zip(peak.squeeze(1).tolist(), sizes.tolist(), strict=True)
    return [
        Upward.of(top) * size if math.isfinite(top) and math.isfinite(size) else Upward(math.inf)
        for top, size in pairs
    ]

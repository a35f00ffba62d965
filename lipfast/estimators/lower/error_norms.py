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
    return layer_norms_of_each(plan, [tensors])[0]


def layer_norms_of_each(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]]
) -> list[tuple[LayerBracket, ...]]:
    """`layer_norms` of many networks, bounded together."""
    layers, count = sweep_of(plan, plan.unfolded).layers, len(tensors)
    networks = ResolvedNetworks(map(dict, tensors))
    found, _ = layer_brackets(LayerCall(layers, networks, 2, _RTOL, 0, [{}] * count))
    return [found.of(network) for network in range(count)]


class ErrorNormsLater:
    """`output_error_norms` of networks of which nothing is looked at before their layers' norms.

    Args:
        plan: the architecture; every op must have an error rule, and `takes` it.
        tensors: checked parameters of the networks.
        points: (networks, C, *shape), float64, taken as exact.

    Attributes:
        outputs: (networks, C, K).
        numbers: what is to be read for `errors`.
    """

    def __init__(
        self, plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], points: Tensor
    ) -> None:
        self._plan, self._tensors, self._count = plan, tensors, points.shape[1]
        self._steps = {step.node.name: step for step in sweep_of(plan, plan.unfolded).steps}
        parameters = stack(tensors, plan.used_parameters, torch.float64)
        self._names: list[str] = []
        found: list[Tensor] = []

        def visit(arguments: NodeArguments, output: Tensor) -> None:
            self._names.append(arguments.node.name)
            found.extend(_sizes_of_each(node_error(arguments, parameters, {}, output)))

        # As in `output_error_norms`.
        with torch.backends.cudnn.flags(enabled=False):
            values = walk(plan.graph, parameters, plan.constants, [points], visit)
        self.outputs = joined_outputs(plan.graph, values)
        self.numbers = torch.stack(found) if found else points.new_empty(0)

    @staticmethod
    def takes(plan: Architecture) -> bool:
        """Whether no node's own error depends on those of its operands."""
        steps = sweep_of(plan, plan.unfolded).steps
        return not any(step.rule.product and step.rule.product(step.node) for step in steps)

    def errors(self, layers: Sequence[Sequence[LayerBracket]], numbers: Tensor) -> Tensor:
        """(networks, C) on the host, from `layer_norms_of_each` and `numbers` there."""
        return torch.tensor(
            [
                self._errors_of(network, own, numbers[:, network].tolist())
                for network, own in enumerate(layers)
            ],
            dtype=torch.float64,
            device="cpu",
        )

    def _errors_of(
        self, network: int, layers: Sequence[LayerBracket], numbers: Sequence[Sequence[float]]
    ) -> list[float]:
        plan, tensors = self._plan, self._tensors[network]
        norms = [layer.upper if layer.certified else math.inf for layer in layers]
        own = dict(zip(self._names, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
        errors = []
        for point in range(self._count):
            known = {node.name: ZERO for node in plan.graph.inputs}
            for name in self._names:
                step = self._steps[name]
                operands = [ZERO if source is None else known[source] for source in step.names]
                added = step.bound(step.call(operands, norms, tensors, plan.constants, 2))
                peaks, sizes = own[name]
                known[name] = _norm_from(peaks[point], sizes[point]) + added
            errors.append(p_norm([known[name] for name in plan.graph.outputs], 2).value)
        return errors


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
    peaks, sizes = _sizes_of_each(errors)
    return [_norm_from(*pair) for pair in zip(peaks[0].tolist(), sizes[0].tolist(), strict=True)]


def _sizes_of_each(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Of bounds (networks, C, *shape) the largest, and the norms over it, (networks, C) each."""
    flat = errors.flatten(2) if errors.dim() > 2 else errors[:, :, None]
    if not flat.shape[2]:
        zeros = flat.new_zeros(flat.shape[:2])
        return zeros, zeros
    peak = flat.amax(2, keepdim=True)
    # Divided by the largest, no square that matters underflows.
    scaled = flat / torch.where(peak > 0, peak, 1.0)
    sizes = scaled.square().sum(2).sqrt() * (1.0 + gamma(flat.shape[2] + 16)) + 2.0**-500
    return peak.squeeze(2), sizes


def _norm_from(peak: float, size: float) -> Upward:
    """One of `_sizes_of_each`."""
    if math.isfinite(peak) and math.isfinite(size):
        return Upward.of(peak) * size
    return Upward(math.inf)

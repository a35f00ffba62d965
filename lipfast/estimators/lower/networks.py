"""Where values and Jacobians of networks come from: a native chain, or the traced graph.

Part of the proof of every certified lower bound are the `enclosures` alone, by `enclosure.enclose`
or the native op (`lipfast.ops.chain_secants`). Jacobians and kinks say where to look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.estimators.enclosure import enclose
from lipfast.graph.nodes import Node
from lipfast.ops._arguments import FLOATING
from lipfast.ops.chain_secants import PiecewiseLinearChains, has_secant_kernels_on
from lipfast.ops.modes import forward_mode
from lipfast.ops.threads import threads
from lipfast.plan.architecture import Architecture
from lipfast.plan.chain import Chain
from lipfast.plan.interpret import evaluate, walk
from lipfast.plan.state import stack
from lipfast.rules.registry import rule_of

LARGEST_JACOBIAN = 1 << 22  # entries; beyond, the direction comes from products with it
# Bytes of parameters that are stacked at a time: they are read again and again, and what is much
# larger comes from memory, and from the system as new pages, every time.
STACKED = 1 << 24
_LARGEST_ACTIVATIONS = 1 << 25  # entries that rows of a Jacobian may take at once


@dataclass(frozen=True)
class TracedNetworks:
    """Networks of any plan, node by node; parameters are stacked, in float64."""

    plan: Architecture
    parameters: Mapping[str, Tensor]

    def jacobians(self, x: Tensor) -> Tensor:
        """(networks, K, D): one copy of the sample per output, each asked for its own gradient."""
        plan, parameters = self.plan, self.parameters
        rows, _ = plan.jacobian_shape
        block = _rows_at_once(len(x) * activations_of(plan))
        parts = []
        for start in range(0, rows, block):
            count = min(block, rows - start)
            with torch.enable_grad():
                copies = x.unsqueeze(1).expand(-1, count, *x.shape[1:]).clone().requires_grad_()
                outputs = evaluate(plan.graph, parameters, plan.constants, [copies])
                own = outputs[:, :, start : start + count].diagonal(dim1=1, dim2=2)
                gradients = _gradients_of(own, copies)
            parts.append(gradients.reshape(*gradients.shape[:2], -1))
        return torch.cat(parts, 1)

    def kink_distances(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """How far ``x + t direction`` stays in the linear region, down and up: (networks,).

        Exact up to rounding for piecewise-linear networks: before the first kink every
        pre-activation is linear in t. A heuristic only: secants are valid whatever the step.
        """
        plan, parameters = self.plan, self.parameters
        kinked: list[tuple[str, tuple[float, ...]]] = []
        for node in plan.graph.nodes:
            kinks = rule_of(node.op).breakpoints
            if kinks is not None:
                kinked.append((_source(node), kinks(node)))
        infinite = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        backward, forward = infinite, infinite.clone()
        if not kinked:
            return backward, forward

        def activations(point: Tensor) -> dict[str, Tensor]:
            found = walk(plan.graph, parameters, plan.constants, [point.unsqueeze(1)], keep=True)
            return {name: found[name] for name, _ in kinked}

        with forward_mode():
            values, slopes = torch.func.jvp(activations, (x,), (direction,))[:2]
        for name, breakpoints in kinked:
            value, slope = values[name].flatten(1), slopes[name].flatten(1)
            for point in breakpoints:
                # A unit that does not move has no kink ahead: 0 / 0 and c / 0 are not distances.
                distance = torch.where(slope != 0, (point - value) / slope, math.inf)
                up = torch.where(distance > 0, distance, math.inf).amin(1)
                down = torch.where(distance < 0, -distance, math.inf).amin(1)
                forward, backward = torch.minimum(forward, up), torch.minimum(backward, down)
        return backward, forward

    def enclosures(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """By `enclose`."""
        return enclose(self.plan, self.parameters, points)


class _Native:
    """Piecewise-linear chains, on all threads where torch's small operations have but one."""

    def __init__(self, chains: PiecewiseLinearChains, workers: int) -> None:
        self.jacobians = threads(workers)(chains.jacobians)
        self.kink_distances = threads(workers)(chains.kink_distances)
        self.enclosures = threads(workers)(chains.enclosures)


Networks = TracedNetworks | _Native
"""What secants need of N networks, one sample or C points of each.

jacobians: (N, K, D) at samples (N, *shape). kink_distances: how far ``x + t direction`` stays in
the linear region, down and up, (N,). enclosures: outputs and bounds of their errors, (N, C, K)
each, at points (N, C, *shape); proved.
"""


def networks_of(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], chain: Chain | None, workers: int
) -> Networks:
    """Networks of one architecture, on `workers` threads if natively: see `native_chain`."""
    if chain is None:
        return TracedNetworks(plan, stack(tensors, plan.used_parameters, torch.float64))
    weights, biases = chain.parameters_of(tensors, plan.constants)
    return _Native(PiecewiseLinearChains(weights, biases, chain.stages), workers)


def chains_on_device(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], samples: Tensor
) -> PiecewiseLinearChains | None:
    """The networks for the kernels of secants of the samples' device, if there are some for them.

    What is larger gains more from products on the whole device.
    """
    chain = plan.piecewise_linear_chain if samples.is_cuda else None
    if (
        chain is None
        or _is_large(plan)
        or not has_secant_kernels_on(chain.stages, plan.jacobian_shape, samples.device)
    ):
        return None
    used = [entry[name] for entry in tensors for name in plan.used_parameters]
    if not all(tensor.is_cuda and tensor.dtype in FLOATING for tensor in used):
        return None
    wide = any(tensor.dtype == torch.float64 for tensor in used)
    dtype = torch.float64 if wide else torch.float32  # exact
    weights, biases = chain.parameters_of(tensors, plan.constants, dtype)
    return PiecewiseLinearChains(weights, biases, chain.stages)


def native_chain(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], samples: Tensor
) -> Chain | None:
    """The plan as `PiecewiseLinearChains` takes it, if it does and one thread each is right.

    What is larger gains more from products on all threads.
    """
    if _is_large(plan) or samples.device.type != "cpu":
        return None
    names = plan.used_parameters
    used = (entry[name] for entry in tensors for name in names)
    if not all(tensor.device.type == "cpu" and tensor.dtype in FLOATING for tensor in used):
        return None
    return plan.piecewise_linear_chain


def _is_large(plan: Architecture) -> bool:
    return bytes_of_parameters(plan) > STACKED or math.prod(plan.jacobian_shape) > LARGEST_JACOBIAN


def bytes_of_parameters(plan: Architecture) -> int:
    """Bytes of one network's parameters, stacked in float64."""
    return 8 * sum(math.prod(plan.shapes[name]) for name in plan.used_parameters)


def activations_of(plan: Architecture) -> int:
    """How many numbers the nodes of a graph have for one sample, all together."""
    return sum(math.prod(node.shape) for node in plan.graph.nodes)


def bytes_per_network(plan: Architecture, points: int) -> int:
    """Bytes that the secants of one network take, with values at some points."""
    parameters, activations = bytes_of_parameters(plan), activations_of(plan)
    rows = min(plan.jacobian_shape[0], _rows_at_once(activations))
    # Weights and their absolute values; values and errors; forward and backward passes per row.
    return 3 * parameters + 8 * 4 * (points + rows) * activations + 1


def _rows_at_once(activations: int) -> int:
    return max(1, _LARGEST_ACTIVATIONS // max(1, activations))


def _gradients_of(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Gradients of the sum; zeros where the outputs are constant."""
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (gradients,) = torch.autograd.grad(outputs.sum(), inputs, materialize_grads=True)
    return gradients


def _source(node: Node) -> str:
    return next(reference.name for reference in node.references() if reference.kind == "node")

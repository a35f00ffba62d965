"""Read a graph as matrices with activations between them, for quadratic constraints of chains.

Part of the proof: it says which matrices and which ranges of slopes stand for a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.interval_jacobian_parts import slopes_of_networks, slopes_of_step
from lipfast.estimators.upper.layer_norms import error_of_weight, weights_with_errors
from lipfast.estimators.upper.map_chains import map_chain
from lipfast.estimators.upper.quadratic.boxes import Boxes, boxes_of
from lipfast.estimators.upper.quadratic.graph_problem import EntrySlopes, entry_key
from lipfast.estimators.upper.quadratic.stacked_quadratic import ChainsOnDevice
from lipfast.estimators.upper.sweep import ITSELF, ZERO, Step, Sweep
from lipfast.norms import Norm
from lipfast.ops.fetched import sent
from lipfast.plan.architecture import Architecture
from lipfast.plan.layers import Layer
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.upward import Upward


@dataclass(frozen=True)
class MatrixChain:
    """Matrices, and between each and the next one entrywise op.

    Attributes:
        layers: the matrices; at least two.
        activations: the ops between them, one fewer.
        last: an op behind the last matrix, whose constant multiplies the bound.
    """

    layers: tuple[Layer, ...]
    activations: tuple[Step, ...]
    last: Step | None

    def matrices(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The operators of one network, (outputs, inputs) each, as they are stored."""
        found = [parameters[layer.weight].detach() for layer in self.layers]
        pairs = zip(self.layers, found, strict=True)
        return [weight.mT if layer.transposed else weight for layer, weight in pairs]

    def errors(self, parameters: Mapping[str, Tensor]) -> list[Tensor | None]:
        """What the stored matrices are off by, entry by entry; None: nothing."""
        found = []
        for layer in self.layers:
            error = error_of_weight(layer, parameters, parameters[layer.weight].detach())
            found.append(error.mT if error is not None and layer.transposed else error)
        return found

    def last_constant(
        self, plan: Architecture, parameters: Mapping[str, Tensor], norm: Norm
    ) -> Upward:
        """The Lipschitz constant of what follows the last matrix."""
        if self.last is None:
            return ITSELF
        others = [ZERO if name is None else ITSELF for name in self.last.names]
        return self.last.bound(self.last.call(others, (), parameters, plan.constants, norm))

    def numbers(
        self, plan: Architecture, parameters: Mapping[str, Tensor], slopes: EntrySlopes | None
    ) -> ChainNumbers | None:
        """All numbers of one network, see `boxes`; None where an activation has no slopes."""
        boxes = self.boxes(plan, parameters, slopes)
        if boxes is None:
            return None
        means, products = [own.means for own in boxes], [own.products for own in boxes]
        return ChainNumbers(self.matrices(parameters), self.errors(parameters), means, products)

    def boxes(
        self,
        plan: Architecture,
        parameters: Mapping[str, Tensor],
        slopes: EntrySlopes | None = None,
    ) -> list[Boxes] | None:
        """The ranges of slopes of one network, per activation; None where one has none.

        Args:
            plan: the architecture.
            parameters: of the network.
            slopes: ranges of slopes on a domain; of other nodes their rules are asked.
        """
        found = []
        for step, layer in zip(self.activations, self.layers, strict=False):
            local = None if slopes is None else slopes.get(entry_key(step.node))
            ends = _slope_range(step, plan, parameters)
            if local is not None:
                ends = local[0].reshape(layer.output_shape), local[1].reshape(layer.output_shape)
            if ends is None:
                return None
            lower, upper = (_rows_of_features(end, layer.output_shape) for end in ends)
            found.append(boxes_of(lower.amin(0), upper.amax(0)))
        return found

    def stored(
        self, plan: Architecture, networks: ResolvedNetworks, device: torch.device
    ) -> StoredChains | None:
        """Those of many networks on a device; None where an activation of one has no slopes."""
        boxes: list[Boxes] = []
        for step, layer in zip(self.activations, self.layers, strict=False):
            if any(reference.kind == "parameter" for reference in step.references):
                ends = slopes_of_networks(step, networks, plan.constants, device)
            else:
                ends = slopes_of_step(step, {}, plan.constants)
            if ends is None:
                return None
            rows = (end.reshape(-1, math.prod(layer.output_shape)) for end in ends)
            shape = (-1, math.prod(layer.output_shape[:-1]), layer.output_shape[-1])
            lower, upper = (end.reshape(shape) for end in rows)
            boxes.append(boxes_of(lower.amin(1), upper.amax(1)))
        # Whether p is 0 can be seen where no parameter says it.
        curved = [not p.is_cpu or bool(p.any()) for _, p in boxes]
        means, products = (_on_device(own, device) for own in zip(*boxes, strict=True))
        return StoredChains(self.layers, networks, means, products, curved)


@dataclass(frozen=True)
class StoredChains:
    """Chains of many networks on a device.

    Attributes:
        layers: the matrices.
        networks: their parameters.
        means: m, per activation (networks or 1, n_i).
        products: p, alike.
        curved: whether p is anything but 0.
    """

    layers: tuple[Layer, ...]
    networks: ResolvedNetworks
    means: Sequence[Tensor]
    products: Sequence[Tensor]
    curved: Sequence[bool]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices, (outputs, inputs)."""
        shapes = [tuple(self.networks[0][layer.weight].shape) for layer in self.layers]
        turned = [layer.transposed for layer in self.layers]
        return [(b, a) if t else (a, b) for (a, b), t in zip(shapes, turned, strict=True)]

    def some(self, chosen: slice) -> ChainsOnDevice:
        """The numbers of those at some positions."""

        def own(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor[chosen] if len(tensor) > 1 else tensor for tensor in tensors]

        pairs = [weights_with_errors(layer, self.networks, chosen) for layer in self.layers]
        weights, errors = zip(*pairs, strict=True)
        return ChainsOnDevice(weights, errors, own(self.means), own(self.products), self.curved)


def _on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Those that are on the host together, in one copy."""
    here = [tensor for tensor in tensors if tensor.is_cpu]
    if not here:
        return list(tensors)
    there = iter(torch.split(sent(torch.cat(here, 1), device), [own.shape[1] for own in here], 1))
    return [next(there) if tensor.is_cpu else tensor for tensor in tensors]


class ChainNumbers(NamedTuple):
    """What the native op takes of one network, map by map or activation by activation."""

    weights: list[Tensor]
    errors: list[Tensor | None]
    means: list[Tensor]
    products: list[Tensor]

    def without_dead_units(self) -> ChainNumbers:
        """A chain without units of slope 0, which give nothing; one of each layer stays."""
        weights, errors = list(self.weights), list(self.errors)
        means, products = list(self.means), list(self.products)
        for layer, (mean, product) in enumerate(zip(means, products, strict=True)):
            alive = (mean != 0) | (product != 0)
            if bool(alive.all()):
                continue
            alive[0] |= not bool(alive.any())
            before, behind = errors[layer], errors[layer + 1]
            errors[layer] = None if before is None else before[alive]
            errors[layer + 1] = None if behind is None else behind[:, alive]
            weights[layer], weights[layer + 1] = weights[layer][alive], weights[layer + 1][:, alive]
            means[layer], products[layer] = mean[alive], product[alive]
        return ChainNumbers(weights, errors, means, products)


def matrix_chain(sweep: Sweep) -> MatrixChain | None:
    """The chain that a graph is; None where it is none, or has fewer than two matrices.

    Matrices act on the last dimension of a sample: on rows of features, each alike. The Jacobian is
    block diagonal then, and one row says all; a reshape may only stand before the first matrix or
    behind the last op, whose result is the only one.
    """
    chain = map_chain(sweep)
    if chain is None or len(chain.layers) < 2:
        return None
    first, *inner, last = chain.between
    tail = [step.rule.reshapes for step in last]
    if not all(step.rule.reshapes for step in first) or False in tail[1:]:
        return None
    if any(len(steps) != 1 or steps[0].rule.reshapes for steps in inner):
        return None
    ends = last[0] if last and not tail[0] else None
    return MatrixChain(chain.layers, tuple(steps[0] for steps in inner), ends)


def _slope_range(
    step: Step, plan: Architecture, parameters: Mapping[str, Tensor]
) -> tuple[float | Tensor, float | Tensor] | None:
    call = step.call([ZERO] * len(step.names), (), parameters, plan.constants, 2)
    return None if step.rule.slopes is None else step.rule.slopes(call)


def _rows_of_features(end: float | Tensor, shape: tuple[int, ...]) -> Tensor:
    """One end of the ranges for every entry of a sample, as rows of features."""
    values = torch.as_tensor(end, dtype=torch.float64)
    return values.expand(shape).reshape(-1, shape[-1])

"""The interval Jacobian: bounds in norms 1 and inf that know the signs of weights and slopes.

Part of the proof of upper bounds in these norms. Between two points the network moves by one
product of its weights and of slopes within the ranges of its activations; the norm of all such
products together is bounded by the largest magnitudes of their entries, which are found from the
outputs to the inputs (`docs/bounds.md`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipfast.estimators.upper.interval_jacobian_balls import (
    Balls,
    SlopeEnd,
    largest_sums,
    together,
)
from lipfast.estimators.upper.interval_jacobian_parts import (
    JacobianPart,
    Matrix,
    Pointwise,
    Range,
    Sum,
    parts_of,
)
from lipfast.estimators.upper.layer_bracket import LayerBrackets
from lipfast.estimators.upper.layer_norms import (
    error_of_weight,
    errors_of_layer,
    weights_with_errors,
)
from lipfast.estimators.upper.local.slopes import LocalSlopes
from lipfast.estimators.upper.many import Tighter
from lipfast.estimators.upper.map_chains import MapChain, map_chain
from lipfast.estimators.upper.sweep import Sweep
from lipfast.graph.nodes import error_name
from lipfast.norms import Norm
from lipfast.ops._sum_norms import slack_of_sum
from lipfast.ops.chain_interval_jacobian import IntervalNorms, chain_interval_jacobian
from lipfast.ops.emulation import products_are_ieee
from lipfast.ops.fetched import Fetched, sent
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.upward import Upward

INTERVAL_JACOBIAN = "interval Jacobian"
# Of one network; beyond, the product is what there is.
_MOST_PRODUCTS = 1 << 34
_BYTES_OF_ONE = 1 << 30
# Of several networks at once.
_BATCH_BYTES = 1 << 27
_BATCH_BYTES_ON_A_DEVICE = 2 << 30
_BYTES_OF_AN_ENTRY = 100  # of a Jacobian, while slopes are taken


class IntervalJacobians(NamedTuple):
    """Bounds of some networks.

    Attributes:
        read: they may be on their way from a device.
        brackets: of their layers, where those were found with them.
    """

    read: Callable[[], Tighter]
    brackets: LayerBrackets | None = None


def interval_jacobians(
    plan: Architecture, sweep: Sweep, networks: ResolvedNetworks, norm: Norm, local: LocalSlopes
) -> IntervalJacobians | None:
    """Bounds of networks in norm 1 or inf, when somebody asks; None where the graph has none.

    It has one where all its nodes are maps of the last axis with a weight, pointwise functions with
    slopes, sums, and moves of entries, and where the work for a network is within `_MOST_PRODUCTS`
    multiplications and `_BYTES_OF_ONE`. On a device everything is queued before anything is read.
    On a domain slopes are those of `local`.
    """
    parts = parts_of(plan, sweep) if networks else None
    layers = [part.layer for part in parts or () if isinstance(part, Matrix)]
    if parts is None or not layers or not _within_reason(plan, sweep, parts):
        return None
    device = networks[0][layers[0].weight].device
    chain = _chain_of(sweep, parts) if device.type == "cpu" else None
    ranges: dict[str, Range] = {}
    slopes: dict[str, tuple[SlopeEnd, SlopeEnd]] = {}
    for part in parts:
        if not isinstance(part, Pointwise):
            continue
        if chain is None and part.numbers is not None and not local.known:
            slopes[part.step.node.name] = part.numbers
            continue
        own = part.slopes(networks, plan, device)
        if own is None:
            return None
        node = part.step.node
        ranges[node.name] = local.of_node(node, own) if local.known else own
    if not products_are_ieee(device):
        return None
    if chain is not None:
        norms, sums = _bounds_of_chain(chain, networks, ranges, norm)
        brackets = _brackets_of(chain, networks, sums, norm)
        return IntervalJacobians(lambda: _tighter(norms.tolist()), brackets)
    slopes |= {name: (low[:, None], high[:, None]) for name, (low, high) in ranges.items()}
    found = Fetched([_Work(plan, sweep, parts, slopes, norm).bounds(networks)])
    return IntervalJacobians(lambda: _tighter(found.read()[0].tolist()))


def _tighter(norms: Sequence[float]) -> Tighter:
    values = [norm if norm < math.inf else math.inf for norm in norms]  # of NaN as well
    return Tighter(INTERVAL_JACOBIAN, values, [Upward.of(value).log for value in values])


def _entries_of_nodes(plan: Architecture, sweep: Sweep) -> dict[str, int]:
    """How many entries a node has."""
    nodes = [*plan.graph.inputs, *(step.node for step in sweep.steps)]
    return {node.name: math.prod(node.shape) for node in nodes}


def _within_reason(plan: Architecture, sweep: Sweep, parts: Sequence[JacobianPart]) -> bool:
    entries = _entries_of_nodes(plan, sweep)
    outputs = sum(entries[name] for name in plan.graph.outputs)
    products = sum(
        outputs * part.rows * math.prod(part.layer.shape)
        for part in parts
        if isinstance(part, Matrix)
    )
    widest = outputs * max(entries.values()) * _BYTES_OF_AN_ENTRY
    return products <= _MOST_PRODUCTS and widest <= _BYTES_OF_ONE


def _chain_of(sweep: Sweep, parts: Sequence[JacobianPart]) -> MapChain | None:
    """The chain that a graph is where its matrices act on whole samples."""
    whole = all(
        part.rows == 1 if isinstance(part, Matrix) else isinstance(part, Pointwise) or moves
        for part, moves in zip(parts, (s.rule.reshapes for s in sweep.steps), strict=True)
    )
    return map_chain(sweep) if whole else None


def _bounds_of_chain(
    chain: MapChain, networks: ResolvedNetworks, slopes: Mapping[str, Range], norm: Norm
) -> IntervalNorms:
    weights, errors = [], []
    for entry in networks:
        own = [entry[layer.weight] for layer in chain.layers]
        wrong = [
            error_of_weight(layer, entry, weight)
            if layer.folds or error_name(layer.weight) in entry
            else None
            for layer, weight in zip(chain.layers, own, strict=True)
        ]
        turned = [layer.transposed for layer in chain.layers]
        weights.append([w.mT if t else w for w, t in zip(own, turned, strict=True)])
        errors.append(
            [e if e is None or not t else e.mT for e, t in zip(wrong, turned, strict=True)]
        )
    ranges = [
        _slopes_in_a_row([slopes[s.node.name] for s in steps if not s.rule.reshapes])
        for steps in chain.between
    ]
    lower, upper = ([None if own is None else own[side] for own in ranges] for side in (0, 1))
    return chain_interval_jacobian(weights, lower, upper, norm=norm, errors=errors)


def _brackets_of(
    chain: MapChain, networks: ResolvedNetworks, sums: Tensor, norm: Norm
) -> LayerBrackets:
    """The norms of the layers alone, from the sums of their stored weights."""
    rows = [layer.shape[0 if (norm == 1) is not layer.transposed else 1] for layer in chain.layers]
    slack = np.array([slack_of_sum(terms) for terms in rows])
    found = sums.numpy()
    lower, ones = np.minimum(found, sys.float_info.max) / slack, np.ones(found.shape, np.int64)
    methods = np.full(found.shape, "sums", dtype=object)
    brackets = LayerBrackets.of_all(
        chain.layers, lower, found * slack, ones.astype(bool), ones, methods
    )
    for position, layer in enumerate(chain.layers):
        errors = errors_of_layer(layer, networks, norm)
        if errors is not None:
            brackets.widen(position, errors(brackets.upper[:, position].tolist()))
    return brackets


def _slopes_in_a_row(ranges: Sequence[Range]) -> Range | None:
    """Products of slopes one after the other, rounded outwards."""
    if len(ranges) < 2:
        return ranges[0] if ranges else None
    low, high = ranges[0]
    infinity = torch.full((), math.inf, dtype=torch.float64, device=low.device)
    for least, most in ranges[1:]:
        ends = torch.stack([a * b for a in (low, high) for b in (least, most)])
        low = torch.nextafter(ends.amin(0), -infinity)
        high = torch.nextafter(ends.amax(0), infinity)
    return low, high


class _Work(NamedTuple):
    """Jacobians of any graph of parts, by products of torch."""

    plan: Architecture
    sweep: Sweep
    parts: Sequence[JacobianPart]
    slopes: Mapping[str, tuple[SlopeEnd, SlopeEnd]]
    norm: Norm

    def bounds(self, networks: ResolvedNetworks) -> Tensor:
        """Of all networks, some at a time."""
        entries = _entries_of_nodes(self.plan, self.sweep)
        outputs = sum(entries[name] for name in self.plan.graph.outputs)
        layers = [part.layer for part in self.parts if isinstance(part, Matrix)]
        # A weight in float64, and its magnitudes.
        weights = 16 * max(math.prod(layer.shape) for layer in layers)
        each = outputs * max(entries.values()) * _BYTES_OF_AN_ENTRY + weights
        here = networks[0][layers[0].weight].is_cpu
        room = (_BATCH_BYTES if here else _BATCH_BYTES_ON_A_DEVICE) // each
        ends = [*range(0, len(networks), max(1, room)), len(networks)]
        found = [self._bounds_of(networks, slice(*pair), entries) for pair in pairwise(ends)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _bounds_of(
        self, networks: ResolvedNetworks, chosen: slice, entries: Mapping[str, int]
    ) -> Tensor:
        readers: dict[str, list[Balls]] = {}
        steps = list(zip(self.sweep.steps, self.parts, strict=True))
        last, part = steps[-1]
        if [last.node.name] == list(self.plan.graph.outputs) and _is_of_whole_samples(part):
            assert isinstance(part, Matrix)
            readers[part.operand] = [Balls(*weights_with_errors(part.layer, networks, chosen))]
            steps.pop()
        else:
            readers = self._outputs(networks, chosen, entries)
        for step, part in reversed(steps):
            own = readers.pop(step.node.name, None)
            if own is None:
                continue
            for operand, balls in self._behind(part, together(own), networks, chosen):
                readers.setdefault(operand, []).append(balls)
        inputs = [together(readers[name]) for name in self.sweep.inputs if name in readers]
        return largest_sums(inputs, self.norm)

    def _outputs(
        self, networks: ResolvedNetworks, chosen: slice, entries: Mapping[str, int]
    ) -> dict[str, list[Balls]]:
        """The identity, in rows for every output."""
        weight = next(part.layer.weight for part in self.parts if isinstance(part, Matrix))
        device = networks[0][weight].device
        names = self.plan.graph.outputs
        count = len(range(len(networks))[chosen])
        total, first = sum(entries[name] for name in names), 0
        readers: dict[str, list[Balls]] = {}
        for name in names:
            middle = torch.zeros(total, entries[name], dtype=torch.float64, device=device)
            middle[first : first + entries[name]].fill_diagonal_(1.0)
            first += entries[name]
            readers.setdefault(name, []).append(Balls(middle.expand(count, -1, -1), None))
        return readers

    def _behind(
        self, part: JacobianPart, balls: Balls, networks: ResolvedNetworks, chosen: slice
    ) -> list[tuple[str, Balls]]:
        """What a node's operands get of its Jacobian."""
        if isinstance(part, Pointwise):
            low, high = (
                end[chosen] if isinstance(end, Tensor) and len(end) > 1 else end
                for end in self.slopes[part.step.node.name]
            )
            return [(part.operand, balls.with_slopes(low, high))]
        if isinstance(part, Matrix):
            return [(part.operand, _through(part, balls, networks, chosen))]
        if isinstance(part, Sum):
            return [(name, _times_factor(balls, factor)) for name, factor in part.terms]
        found = []
        device = balls.middle.device
        for name, positions, often, size in part.parts:
            if positions is None:
                found.append((name, balls))
                continue
            at, source = (sent(index, device) for index in positions)
            read = balls.on_both(partial(torch.index_select, dim=2, index=at))
            found.append((name, read.moved(source, often, size)))
        return found


def _times_factor(balls: Balls, factor: float) -> Balls:
    if factor in (1.0, -1.0):
        return Balls(balls.middle * factor, balls.radius)
    return balls.with_slopes(factor, factor)


def _is_of_whole_samples(part: JacobianPart) -> bool:
    """Whether a part is a map of the whole sample."""
    return isinstance(part, Matrix) and part.rows == 1


def _through(part: Matrix, balls: Balls, networks: ResolvedNetworks, chosen: slice) -> Balls:
    weights, errors = weights_with_errors(part.layer, networks, chosen)
    shape = balls.middle.shape[:2]
    rows = balls.on_both(lambda side: side.reshape(len(weights), -1, weights.shape[1]))
    return rows.times(weights, errors).on_both(lambda side: side.reshape(*shape, -1))

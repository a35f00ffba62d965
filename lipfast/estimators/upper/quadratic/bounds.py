"""Upper bounds by quadratic constraints: of chains natively, of other graphs in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.many import Tighter
from lipfast.estimators.upper.quadratic.boxes import Boxes
from lipfast.estimators.upper.quadratic.certificate import (
    Multipliers,
    QuadraticCertificate,
    WarmStart,
)
from lipfast.estimators.upper.quadratic.chains import MatrixChain, matrix_chain
from lipfast.estimators.upper.quadratic.graph_quadratic import graph_quadratic
from lipfast.estimators.upper.quadratic.stacked_quadratic import (
    ProvedChains,
    ProvedLater,
    bytes_of_one,
)
from lipfast.estimators.upper.sweep import ITSELF, ZERO, Sweep
from lipfast.ops.chain_quadratic import ChainQuadratic, chain_quadratic
from lipfast.ops.emulation import products_are_ieee
from lipfast.ops.stack import stacked
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.upward import Upward

QUADRATIC = "quadratic constraints"
EVALUATIONS = {1: 10, 2: 30, 3: 300}
"""Sweeps of the search, by effort."""
WARM_EVALUATIONS = {1: 10, 2: 10, 3: 300}
"""The same from the multipliers of a network that is earlier in the same run, somewhere."""
NEXT_EVALUATIONS = {1: 1, 2: 3, 3: 300}
"""The same from those of the checkpoint just before. One evaluation each is as good as ten without
a start where checkpoints follow each other closely (a few per cent of the weights' norm)."""
_LOST = 0.1
"""Of the gain on the product, in logarithms, that is more than networks that follow each other
lose; 0.01 of it may be lost every time."""
_LOST_EACH_TIME = 0.01


def quadratic_bounds(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    *,
    effort: int,
    start: Sequence[WarmStart | None],
    follow: bool,
    products: Sequence[float],
    memory: int,
) -> Tighter | str:
    r"""Certified bounds in norm 2, or why there are none.

    $\|J\| \le \rho$ for all slopes of the activations' ranges, if a matrix made of the weights,
    multipliers $D > 0$ and $\rho^2$ is positive (Fazlyab et al., 2019). Multipliers are searched
    for in floating point; a Cholesky factorisation whose rounding is accounted for proves the rest:
    one of all blocks for a chain of matrices and entrywise ops, one per step for other graphs.

    Args:
        plan: the architecture.
        sweep: of the graph that the networks are bounded by.
        networks: their parameters, with those that are new in the graph.
        effort: how long multipliers are searched for: 1, 2 or 3.
        start: for each network what a similar one had found, or None; only chains take them.
        follow: whether those similar ones are just before in a run.
        products: logarithms of the products of norms, which say how well a start did.
        memory: bytes that one matrix of a graph, and what makes it, may take.
    """
    # On a device a chain that has slopes was queued.
    chain = None if _device_of_networks(networks).type == "cuda" else matrix_chain(sweep)
    boxes = None if chain is None else _all_boxes(chain, plan, networks)
    if chain is None or boxes is None:
        return _bounds_of_graphs(plan, networks, effort=effort, memory=memory)
    call = _ChainCall(chain, plan, networks, boxes)
    sizes = [layer.output_shape[-1] for layer in chain.layers[:-1]]
    fitting = [own if own and _is_of_chain(own.multipliers, sizes) else None for own in start]
    warm = NEXT_EVALUATIONS if follow else WARM_EVALUATIONS
    evaluations = (warm if all(fitting) else EVALUATIONS)[effort]
    found = call.found(range(len(networks)), evaluations, fitting)
    # A start from far off leads to less than none.
    before = [own.gain if own else -math.inf for own in fitting]
    gains = [p - log for p, log in zip(products, found.logs, strict=True)]
    lost = [i for i, gain in enumerate(gains) if fitting[i] and not gain >= before[i] - _LOST]
    if lost:
        found = found.or_better(call.found(lost, EVALUATIONS[effort], [None] * len(lost)), lost)
        gains = [p - log for p, log in zip(products, found.logs, strict=True)]
        before = [-math.inf if i in set(lost) else own for i, own in enumerate(before)]

    def warm_start(network: int) -> WarmStart | None:
        gain = max(gains[network], before[network] - _LOST_EACH_TIME)
        return WarmStart(found.multipliers(network), gain) if gains[network] > 0 else None

    return Tighter(QUADRATIC, found.values, found.logs, found.certificate, warm_start)


def queued_bounds(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    *,
    effort: int,
    start: Sequence[WarmStart | None],
    memory: int,
) -> Callable[[Sequence[float]], Tighter | str] | None:
    """`quadratic_bounds` of chains on a CUDA device, when somebody has the products of norms.

    They are queued at once, and nothing of them is looked at before. None where they are elsewhere,
    or no chains.
    """
    device, chain = _device_of_networks(networks), matrix_chain(sweep)
    if chain is None or device.type != "cuda":
        return None
    stored = chain.stored(plan, networks, device)
    if stored is None:
        return None
    why, needed = None, bytes_of_one(stored.shapes)
    if not products_are_ieee(device):
        why = f"{device} computes float64 with shorter numbers"
    elif needed > memory:
        why = f"a network takes {needed / 2**20:.0f} MiB, more than memory={memory}"
    elif min(map(min, stored.shapes)) == 0:
        why = "a matrix has no entries"
    if why is not None:
        return lambda _: f"no quadratic constraints: {why}"
    sizes = [layer.output_shape[-1] for layer in chain.layers[:-1]]
    fitting = [own if own and _is_of_chain(own.multipliers, sizes) else None for own in start]
    room = memory // needed
    later = ProvedLater(
        stored.some,
        [slice(first, first + room) for first in range(0, len(networks), room)],
        evaluations=(WARM_EVALUATIONS if all(fitting) else EVALUATIONS)[effort],
        start=_stacked_starts(fitting, sizes, device) if any(fitting) else None,
    )

    def bounds(products: Sequence[float]) -> Tighter:
        call = later.read()
        values, logs = _unscaled(chain, plan, networks, call)
        found = _ProvedChains(chain, values, logs, [(call, row) for row in range(len(networks))])

        def warm_start(network: int) -> WarmStart | None:
            gain = products[network] - logs[network]
            return WarmStart(found.multipliers(network), gain) if gain > 0 else None

        return Tighter(QUADRATIC, values, logs, found.certificate, warm_start)

    return bounds


def _device_of_networks(networks: ResolvedNetworks) -> torch.device:
    return next((t.device for t in networks[0].values()), torch.device("cpu"))


class _ProvedChains(NamedTuple):
    """Bounds of networks of a chain, and which of the native calls proved each.

    Attributes:
        chain: of matrices.
        values: the bounds, with the constant of what follows the last matrix.
        logs: their logarithms.
        proved: of each network, the call, and the row there.
    """

    chain: MatrixChain
    values: list[float]
    logs: list[float]
    proved: list[tuple[ChainQuadratic | ProvedChains, int]]

    def or_better(self, other: _ProvedChains, chosen: Sequence[int]) -> _ProvedChains:
        """The smaller bound each, where another call was made for some."""
        values, logs, proved = list(self.values), list(self.logs), list(self.proved)
        for row, network in enumerate(chosen):
            if other.logs[row] < logs[network]:
                values[network], logs[network] = other.values[row], other.logs[row]
                proved[network] = other.proved[row]
        return self._replace(values=values, logs=logs, proved=proved)

    def multipliers(self, network: int) -> Multipliers:
        call, row = self.proved[network]
        # On a device, where copies of many rows are many launches, parts of all of them.
        return [own[row].clone() if own.is_cpu else own[row] for own in call.logs]

    def certificate(self, network: int) -> QuadraticCertificate:
        call, row = self.proved[network]
        return QuadraticCertificate(
            tuple(layer.name for layer in self.chain.layers),
            tuple(own[row].clone() for own in call.multipliers),
            tuple(own[row].clone() for own in call.unit_exponents),
            tuple(call.weight_exponents[row].tolist()),
            float(call.squares[row]),
        )


class _ChainCall(NamedTuple):
    """Networks of a chain, with the ranges of slopes: per activation, of all or of each."""

    chain: MatrixChain
    plan: Architecture
    networks: ResolvedNetworks
    boxes: tuple[list[Tensor], list[Tensor]]

    def found(
        self, chosen: Sequence[int], evaluations: int, start: Sequence[WarmStart | None]
    ) -> _ProvedChains:
        """Bounds of some of the networks, in one native call."""
        networks = [self.networks[index] for index in chosen]
        means, products = (
            [own if own.dim() == 1 else own[list(chosen)] for own in side] for side in self.boxes
        )
        sizes = [layer.output_shape[-1] for layer in self.chain.layers[:-1]]
        call = chain_quadratic(
            [self.chain.matrices(entry) for entry in networks],
            means,
            products,
            errors=_all_errors(self.chain, networks),
            evaluations=evaluations,
            start=_stacked_starts(start, sizes) if any(start) else None,
        )
        values, logs = _unscaled(self.chain, self.plan, networks, call)
        return _ProvedChains(
            self.chain, values, logs, [(call, row) for row in range(len(networks))]
        )


def _bounds_of_graphs(
    plan: Architecture, networks: ResolvedNetworks, *, effort: int, memory: int
) -> Tighter | str:
    """Of what is no chain, network by network; the first reason where none has a bound."""
    found = [
        graph_quadratic(plan, entry, evaluations=EVALUATIONS[effort], memory=memory)
        for entry in networks
    ]
    if all(math.isinf(own.log_value) and own.log_value > 0 for own in found):
        return f"no quadratic constraints: {found[0].reason}"
    return Tighter(QUADRATIC, [own.value for own in found], [own.log_value for own in found])


def _all_boxes(
    chain: MatrixChain, plan: Architecture, networks: ResolvedNetworks
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Means and products per activation, (n_i,) where they are those of all networks."""
    reads = any(None in step.names for step in chain.activations)
    found: list[list[Boxes]] = []
    for entry in networks if reads else networks[:1]:
        own = chain.boxes(plan, entry)
        if own is None:
            return None
        found.append(own)
    if not reads:
        return [own.means for own in found[0]], [own.products for own in found[0]]
    columns = list(zip(*found, strict=True))
    return (
        [torch.stack([own.means for own in column]) for column in columns],
        [torch.stack([own.products for own in column]) for column in columns],
    )


def _all_errors(
    chain: MatrixChain, networks: Sequence[Mapping[str, Tensor]]
) -> list[list[Tensor | None]] | None:
    found = [chain.errors(entry) for entry in networks]
    exact = all(error is None for own in found for error in own)
    return None if exact else found


def _is_of_chain(start: Multipliers, sizes: Sequence[int]) -> bool:
    """Whether multipliers are of this chain, and not of the same network by another graph."""
    return [len(own) for own in start] == list(sizes)


def _stacked_starts(
    start: Sequence[WarmStart | None],
    sizes: Sequence[int],
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
) -> list[Tensor]:
    """(N, n_i) each; NaN for networks without."""
    none = [torch.full((n,), torch.nan, dtype=torch.float64, device=device) for n in sizes]
    rows = (own.multipliers if own else none for own in start)
    return [stacked(column) for column in zip(*rows, strict=True)]


def _unscaled(
    chain: MatrixChain,
    plan: Architecture,
    networks: Sequence[Mapping[str, Tensor]],
    found: ChainQuadratic | ProvedChains,
) -> tuple[list[float], list[float]]:
    """Bounds of the weights as they are, times the constant of what follows the last matrix."""
    values: list[float] = []
    logs: list[float] = []
    rows = zip(
        found.squares.tolist(), found.weight_exponents.sum(1).tolist(), networks, strict=True
    )
    for square, shift, entry in rows:
        root = Upward.of(square).square_root()
        total = root if root.unbounded else Upward(root.mantissa, root.exponent + shift)
        if chain.last is not None:
            others = [ZERO if name is None else ITSELF for name in chain.last.names]
            total = total * chain.last.bound(chain.last.call(others, (), entry, plan.constants, 2))
        values.append(total.value)
        logs.append(total.log)
    return values, logs

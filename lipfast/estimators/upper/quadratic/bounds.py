"""Upper bounds by quadratic constraints: of chains natively, of other graphs in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.upper.many import Tighter
from lipfast.estimators.upper.quadratic.boxes import Boxes
from lipfast.estimators.upper.quadratic.certificate import Multipliers, QuadraticCertificate
from lipfast.estimators.upper.quadratic.chains import MatrixChain, matrix_chain
from lipfast.estimators.upper.quadratic.graph_problem import EntrySlopes
from lipfast.estimators.upper.quadratic.graph_quadratic import graph_quadratic
from lipfast.estimators.upper.sweep import ITSELF, ZERO, Sweep
from lipfast.ops.chain_quadratic import ChainQuadratic, chain_quadratic
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.upward import Upward

QUADRATIC = "quadratic constraints"
EVALUATIONS = {1: 10, 2: 30, 3: 300}
"""Sweeps of the search, by effort."""
WARM_EVALUATIONS = {1: 10, 2: 10, 3: 300}
"""The same from the multipliers of a similar network; with fewer, those of one that is hundreds of
steps away gain little on the product."""
# What part of all units may have more than one slope where the others are left out.
_FEW_FREE = 0.125


def quadratic_bounds(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    *,
    effort: int,
    start: Sequence[Multipliers | None],
    memory: int,
    slopes: Sequence[EntrySlopes] | None = None,
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
        start: for each network multipliers of a similar one, or None; only chains take them.
        memory: bytes that one matrix of a graph, and what makes it, may take.
        slopes: for each network ranges of slopes on a domain; the bound is then for pairs of its
            points, never above that of all pairs, and has no certificate.

    Raises:
        ArgumentError: the networks are on a device.
    """
    if not all(tensor.is_cpu for tensor in networks[0].values()):
        raise ArgumentError(
            "method='quadratic' runs on the CPU: move the state dict there, or use method='product'"
        )
    found = _by_slopes(plan, sweep, networks, None, effort=effort, start=start, memory=memory)
    if not any(slopes or ()):
        return found
    near = _by_slopes(plan, sweep, networks, slopes, effort=effort, start=start, memory=memory)
    return _smaller_of_both(near, found)


def _smaller_of_both(near: Tighter | str, found: Tighter | str) -> Tighter | str:
    """For each network the smaller of its bounds on a domain and everywhere: searches may fail."""
    if isinstance(near, str) or isinstance(found, str):
        return found if isinstance(near, str) else near
    values = [min(pair) for pair in zip(near.values, found.values, strict=True)]
    logs = [min(pair) for pair in zip(near.logs, found.logs, strict=True)]
    return Tighter(QUADRATIC, values, logs, multipliers=found.multipliers)


def _by_slopes(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    slopes: Sequence[EntrySlopes] | None,
    *,
    effort: int,
    start: Sequence[Multipliers | None],
    memory: int,
) -> Tighter | str:
    chain = matrix_chain(sweep)
    boxes = None if chain is None else all_boxes(chain, plan, networks, slopes)
    if chain is None or boxes is None:
        return _bounds_of_graphs(plan, networks, slopes, effort=effort, memory=memory)
    sizes = [layer.output_shape[-1] for layer in chain.layers[:-1]]
    fitting = [own if _is_of_chain(own, sizes) else None for own in start]
    warm = all(own is not None for own in fitting)
    found = chain_quadratic(
        [chain.matrices(entry) for entry in networks],
        *boxes,
        errors=all_errors(chain, networks),
        evaluations=(WARM_EVALUATIONS if warm else EVALUATIONS)[effort],
        start=None if all(own is None for own in fitting) else _stacked_starts(fitting, sizes),
    )
    values, logs = _unscaled(chain, plan, networks, found)
    if slopes is not None:
        _without_known_units(plan, networks, slopes, (values, logs), effort=effort, memory=memory)
    return Tighter(
        QUADRATIC,
        values,
        logs,
        certificate=lambda network: _certificate(chain, found, network),
        multipliers=lambda network: [own[network].clone() for own in found.logs],
    )


def _bounds_of_graphs(
    plan: Architecture,
    networks: ResolvedNetworks,
    slopes: Sequence[EntrySlopes] | None,
    *,
    effort: int,
    memory: int,
) -> Tighter | str:
    """Of what is no chain, network by network; the first reason where none has a bound."""
    evaluations = EVALUATIONS[effort]
    local: Sequence[EntrySlopes | None] = slopes or [None] * len(networks)
    found = [
        graph_quadratic(plan, entry, evaluations=evaluations, memory=memory, slopes=own)
        for entry, own in zip(networks, local, strict=True)
    ]
    if all(math.isinf(own.log_value) and own.log_value > 0 for own in found):
        return f"no quadratic constraints: {found[0].reason}"
    return Tighter(QUADRATIC, [own.value for own in found], [own.log_value for own in found])


def _without_known_units(
    plan: Architecture,
    networks: ResolvedNetworks,
    slopes: Sequence[EntrySlopes],
    bounds: tuple[list[float], list[float]],
    *,
    effort: int,
    memory: int,
) -> None:
    """Smaller bounds of chains most of whose units have one slope: only the others are units.

    Otherwise those would have multipliers that are nearly infinite, for about a part in a hundred.
    """
    values, logs = bounds
    for network, (entry, own) in enumerate(zip(networks, slopes, strict=True)):
        free = sum(int((lower < upper).sum()) for lower, upper in own.values())
        if not own or free > _FEW_FREE * sum(len(lower) for lower, _ in own.values()):
            continue
        evaluations = EVALUATIONS[effort]
        found = graph_quadratic(plan, entry, evaluations=evaluations, memory=memory, slopes=own)
        if found.log_value < logs[network]:
            values[network], logs[network] = found.value, found.log_value


def _certificate(chain: MatrixChain, found: ChainQuadratic, network: int) -> QuadraticCertificate:
    return QuadraticCertificate(
        tuple(layer.name for layer in chain.layers),
        tuple(own[network].clone() for own in found.multipliers),
        tuple(own[network].clone() for own in found.unit_exponents),
        tuple(found.weight_exponents[network].tolist()),
        float(found.squares[network]),
    )


def all_boxes(
    chain: MatrixChain,
    plan: Architecture,
    networks: ResolvedNetworks,
    slopes: Sequence[EntrySlopes] | None,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Means and products per activation, (n_i,) where they are those of all networks."""
    reads = slopes is not None or any(None in step.names for step in chain.activations)
    found: list[list[Boxes]] = []
    for index, entry in enumerate(networks if reads else networks[:1]):
        own = chain.boxes(plan, entry, None if slopes is None else slopes[index])
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


def all_errors(chain: MatrixChain, networks: ResolvedNetworks) -> list[list[Tensor | None]] | None:
    """What the matrices of each network are off by; None where all are exact."""
    found = [chain.errors(entry) for entry in networks]
    exact = all(error is None for own in found for error in own)
    return None if exact else found


def _is_of_chain(start: Multipliers | None, sizes: Sequence[int]) -> bool:
    """Whether multipliers are of this chain, and not of the same network by another graph."""
    return start is not None and [len(own) for own in start] == list(sizes)


def _stacked_starts(start: Sequence[Multipliers | None], sizes: Sequence[int]) -> list[Tensor]:
    """(N, n_i) each; NaN for networks without."""
    none = [torch.full((size,), torch.nan, dtype=torch.float64) for size in sizes]
    return [torch.stack(column) for column in zip(*(own or none for own in start), strict=True)]


def _unscaled(
    chain: MatrixChain, plan: Architecture, networks: ResolvedNetworks, found: ChainQuadratic
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

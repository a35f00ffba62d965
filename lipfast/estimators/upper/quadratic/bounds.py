"""Upper bounds by quadratic constraints: of chains natively, of other graphs in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.upper.many import Tighter
from lipfast.estimators.upper.quadratic.boxes import Boxes
from lipfast.estimators.upper.quadratic.certificate import Multipliers, QuadraticCertificate
from lipfast.estimators.upper.quadratic.chains import MatrixChain, matrix_chain
from lipfast.estimators.upper.quadratic.graph_problem import EntrySlopes
from lipfast.estimators.upper.quadratic.graph_quadratic import graph_quadratic
from lipfast.estimators.upper.quadratic.stacked_quadratic import (
    ProvedChains,
    ProvedLater,
    bytes_of_one,
)
from lipfast.estimators.upper.sweep import Sweep
from lipfast.ops.chain_quadratic import ChainQuadratic, chain_quadratic
from lipfast.ops.emulation import products_are_ieee
from lipfast.ops.stack import stacked
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.upward import Upward

QUADRATIC = "quadratic constraints"
EVALUATIONS = {1: 10, 2: 30, 3: 300}
"""Sweeps of the search, by effort."""
OPERATIONS = {1: 4e12, 2: 1e13, 3: 1e14}
"""Multiplications and additions that one network which is no chain may take, by effort: about 15 s,
40 s and seven minutes of one core."""
WARM_EVALUATIONS = {1: 10, 2: 10, 3: 300}
"""The same from the multipliers of a network that is earlier in the same run, somewhere."""
NEXT_EVALUATIONS = {1: 1, 2: 3, 3: 300}
"""The same from those of the checkpoint just before. One evaluation each is as good as ten without
a start where checkpoints follow each other closely (a few per cent of the weights' norm); where
they do not, the op takes more."""
# What part of all units may have more than one slope where the others are left out.
_FEW_FREE = 0.125


def quadratic_bounds(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    *,
    effort: int,
    start: Sequence[Multipliers | None],
    follow: bool,
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
        follow: whether those similar ones are just before in a run.
        memory: bytes that all matrices of a graph may take together; networks are bounded one by
            one. What would take more, or more than `OPERATIONS`, has no bound, and says so.
        slopes: for each network ranges of slopes on a domain; the bound is then for pairs of its
            points, never above that of all pairs, and has no certificate.
    """
    found = _everywhere(
        plan, sweep, networks, effort=effort, start=start, follow=follow, memory=memory
    )
    if not any(slopes or ()):
        return found
    assert slopes is not None
    near = _on_domain(plan, sweep, networks, slopes, effort=effort, memory=memory)
    return _smaller_of_both(near, found)


def _smaller_of_both(near: Tighter | str, found: Tighter | str) -> Tighter | str:
    """For each network the smaller of its bounds on a domain and everywhere: searches may fail."""
    if isinstance(near, str) or isinstance(found, str):
        return found if isinstance(near, str) else near
    values = [min(pair) for pair in zip(near.values, found.values, strict=True)]
    logs = [min(pair) for pair in zip(near.logs, found.logs, strict=True)]
    return Tighter(QUADRATIC, values, logs, warm_start=found.warm_start)


def _everywhere(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    *,
    effort: int,
    start: Sequence[Multipliers | None],
    follow: bool,
    memory: int,
) -> Tighter | str:
    # On a device a chain that has slopes was queued.
    chain = None if _device_of_networks(networks).type == "cuda" else matrix_chain(sweep)
    boxes = None if chain is None else _all_boxes(chain, plan, networks)
    if chain is None or boxes is None:
        return _bounds_of_graphs(plan, networks, None, effort=effort, memory=memory)
    sizes = [layer.output_shape[-1] for layer in chain.layers[:-1]]
    fitting = [own if own and _is_of_chain(own, sizes) else None for own in start]
    warm = NEXT_EVALUATIONS if follow else WARM_EVALUATIONS
    call = chain_quadratic(
        [chain.matrices(entry) for entry in networks],
        *boxes,
        errors=_all_errors(chain, networks),
        evaluations=(warm if all(fitting) else EVALUATIONS)[effort],
        start=_stacked_starts(fitting, sizes) if any(fitting) else None,
    )
    return _tighter_by(chain, plan, networks, call)


def queued_bounds(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    *,
    effort: int,
    start: Sequence[Multipliers | None],
    memory: int,
) -> Callable[[], Tighter | str] | None:
    """`quadratic_bounds` of chains on a CUDA device, when somebody asks.

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
        return lambda: f"no quadratic constraints: {why}"
    sizes = [layer.output_shape[-1] for layer in chain.layers[:-1]]
    fitting = [own if own and _is_of_chain(own, sizes) else None for own in start]
    room = memory // needed
    later = ProvedLater(
        stored.some,
        [slice(first, first + room) for first in range(0, len(networks), room)],
        evaluations=(WARM_EVALUATIONS if all(fitting) else EVALUATIONS)[effort],
        start=_stacked_starts(fitting, sizes, device) if any(fitting) else None,
    )

    return lambda: _tighter_by(chain, plan, networks, later.read())


def _device_of_networks(networks: ResolvedNetworks) -> torch.device:
    return next((t.device for t in networks[0].values()), torch.device("cpu"))


def _tighter_by(
    chain: MatrixChain,
    plan: Architecture,
    networks: ResolvedNetworks,
    call: ChainQuadratic | ProvedChains,
) -> Tighter:
    """The bounds of a chain's networks, with what proves each."""
    bounds = [_unscaled_bound(chain, plan, own, call, index) for index, own in enumerate(networks)]

    def multipliers(network: int) -> Multipliers:
        # On a device, where copies of many rows are many launches, parts of all of them.
        return [own[network].clone() if own.is_cpu else own[network] for own in call.logs]

    def certificate(network: int) -> QuadraticCertificate:
        return QuadraticCertificate(
            tuple(layer.name for layer in chain.layers),
            tuple(own[network].clone() for own in call.multipliers),
            tuple(own[network].clone() for own in call.unit_exponents),
            tuple(call.weight_exponents[network].tolist()),
            float(call.squares[network]),
        )

    values, logs = [own.value for own in bounds], [own.log for own in bounds]
    return Tighter(QUADRATIC, values, logs, certificate, multipliers)


def _on_domain(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    slopes: Sequence[EntrySlopes],
    *,
    effort: int,
    memory: int,
) -> Tighter | str:
    """Of chains without their dead units, which differ from network to network.

    Units of one slope stay, with multipliers that are nearly infinite, and cost up to a part in a
    hundred; where few have more than one, steps of a graph have these units alone.
    """
    chain = matrix_chain(sweep)
    pairs = list(zip(networks, slopes, strict=True))
    numbers = [] if chain is None else [chain.numbers(plan, *pair) for pair in pairs]
    if chain is None or not all(numbers):
        return _bounds_of_graphs(plan, networks, slopes, effort=effort, memory=memory)
    bounds: list[Upward] = []
    for (entry, local), own in zip(pairs, numbers, strict=True):
        assert own is not None
        weights, errors, *units = own.without_dead_units()
        wrong = None if all(error is None for error in errors) else [errors]
        evaluations = EVALUATIONS[effort]
        found = chain_quadratic([weights], *units, errors=wrong, evaluations=evaluations)
        bounds.append(_unscaled_bound(chain, plan, entry, found, 0))
        free = sum(int((lower < upper).sum()) for lower, upper in local.values())
        if free > _FEW_FREE * sum(len(lower) for lower, _ in local.values()):
            continue
        other = graph_quadratic(
            plan,
            entry,
            evaluations=evaluations,
            memory=memory,
            operations=OPERATIONS[effort],
            slopes=local,
        )
        if other.log_value < bounds[-1].log and math.isfinite(other.value):
            bounds[-1] = Upward.of(other.value)
    return Tighter(QUADRATIC, [own.value for own in bounds], [own.log for own in bounds])


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
        graph_quadratic(
            plan,
            entry,
            evaluations=evaluations,
            memory=memory,
            operations=OPERATIONS[effort],
            slopes=own,
        )
        for entry, own in zip(networks, local, strict=True)
    ]
    if all(math.isinf(own.log_value) and own.log_value > 0 for own in found):
        return f"no quadratic constraints: {found[0].reason}"
    return Tighter(
        QUADRATIC,
        [own.value for own in found],
        [own.log_value for own in found],
        reasons=[own.reason and f"no quadratic constraints: {own.reason}" for own in found],
    )


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
    start: Sequence[Multipliers | None],
    sizes: Sequence[int],
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
) -> list[Tensor]:
    """(N, n_i) each; NaN for networks without."""
    none = [torch.full((n,), torch.nan, dtype=torch.float64, device=device) for n in sizes]
    rows = (own or none for own in start)
    return [stacked(column) for column in zip(*rows, strict=True)]


def _unscaled_bound(
    chain: MatrixChain,
    plan: Architecture,
    entry: Mapping[str, Tensor],
    found: ChainQuadratic | ProvedChains,
    index: int,
) -> Upward:
    """The bound of the weights as they are, times the constant of what follows the last matrix."""
    root = Upward.of(float(found.squares[index])).square_root()
    shift = int(found.weight_exponents[index].sum())
    total = root if root.unbounded else Upward(root.mantissa, root.exponent + shift)
    if chain.last is None:
        return total
    return total * chain.last_constant(plan, entry, 2)

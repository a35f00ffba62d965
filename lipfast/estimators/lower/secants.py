"""Certified lower bounds: difference quotients in float64 with running error bounds.

Autograd's value at a kink is not a derivative, and a float64 evaluation by itself proves nothing.
For any two points a, b, ``||f(a) - f(b)|| / ||a - b||`` is a lower bound on the Lipschitz constant.
The points are stored float64 numbers; f is evaluated with an elementwise bound of its rounding
error (running error analysis, Higham, 2002, sec. 3.3); the quotient is rounded down. So the result
holds in real arithmetic, at kinks and for smooth activations, whatever the points are. Only the
choice of the points is heuristic.

The proof is in few files: here what is put together, `networks` and `enclosure` (values with
elementwise errors), `error_norms` (errors in norm) and `quotients` (rounded down). `points` says
where to look and proves nothing.

Assumed: sums and products of float64 are IEEE (in any order, fused or not; denormals are kept, see
`lipfast.ops.denormals`), and torch's float64 elementary functions are as accurate as
`rules.running_errors.EVALUATION_ROUNDOFFS` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.lower.error_norms import layer_norms, output_error_norms
from lipfast.estimators.lower.networks import (
    STACKED,
    Networks,
    activations_of,
    bytes_of_parameters,
    bytes_per_network,
    chains_on_device,
    native_chain,
    networks_of,
)
from lipfast.estimators.lower.points import COUNT, FRACTIONS, LADDER, LONGEST, points_around
from lipfast.estimators.lower.quotients import differences, quotients, quotients_in_norm
from lipfast.norms import Norm
from lipfast.ops.chain_secants import PiecewiseLinearChains
from lipfast.ops.modes import plain_arithmetic
from lipfast.ops.threads import native_workers, one_thread
from lipfast.plan.architecture import Architecture

# Quotients below this share of those without errors: errors are then bounded in norm as well.
_TIGHT = 0.99
# Networks of the native op at a time, which reads their weights where they are.
_NATIVE = 256
# Multiplications of the native op; with fewer, threads wait for each other longer than they work.
_SHARED = 1 << 23


@dataclass(frozen=True)
class Secants:
    """The best certified difference quotient of each network.

    Attributes:
        values: (networks,), rounded down; 0 where nothing could be proved.
        points: (networks, 2, *shape), the two stored points in float64.
        loose: (networks,), not zero where little is left of the quotients that would hold without
            errors, so that errors bounded in norm might give more.
        known: the values, where they are on the host already.
    """

    values: Tensor
    points: Tensor
    loose: Tensor
    known: Sequence[float] | None = None

    def read(self) -> tuple[Secants, list[int]]:
        """These with their values on the host, and which are loose."""
        values, loose = torch.stack([self.values, self.loose.to(self.values)]).tolist()
        again = [network for network, is_loose in enumerate(loose) if is_loose]
        return replace(self, known=values), again

    def of_each(self) -> list[tuple[float, Tensor]]:
        """Value and points (2, *shape) of each network."""
        values = self.values.tolist() if self.known is None else self.known
        return list(zip(values, self.points, strict=True))

    def replaced(self, networks: Sequence[int], found: Secants) -> Secants:
        """Other secants for some networks."""
        pairs = self.of_each()
        for network, pair in zip(networks, found.of_each(), strict=True):
            pairs[network] = pair
        values, points = zip(*pairs, strict=True)
        return replace(self, known=values, points=torch.stack(points))


def certified_secants(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    samples: Tensor,
    *,
    norm: Norm = 2,
    memory: int = 1 << 30,
    domain: Domain | None = None,
    in_norm: bool = True,
) -> Secants:
    """Certified lower bounds from one sample per network.

    Args:
        plan: the architecture; every op must have an error rule (`missing_error_rules`).
        tensors: checked parameters of each network.
        samples: (networks, *shape): where to look, usually the arg-max of the Jacobian norm.
        norm: 1, 2 or inf.
        memory: bytes for stacked parameters and activations.
        domain: both points of a secant are moved into it.
        in_norm: bound errors in norm as well where elementwise bounds leave little; that waits for
            the device.

    Returns:
        The best secant of each network among several steps along the direction that the Jacobian
        stretches most.
    """
    through_torch = partial(_block_by_block, plan, norm=norm, memory=memory, domain=domain)
    with plain_arithmetic():
        chains = chains_on_device(plan, tensors, samples)
        if chains is not None:
            found = _by_kernels(chains, samples, norm, domain)
            if not in_norm:
                return found
            found, again = found.read()
            if not again:
                return found
            own = [tensors[network] for network in again]
            return found.replaced(again, through_torch(own, samples[again], in_norm=True))
    return through_torch(tensors, samples, in_norm=in_norm)


def _by_kernels(
    chains: PiecewiseLinearChains, samples: Tensor, norm: Norm, domain: Domain | None
) -> Secants:
    """Two launches on the samples' device, however many networks there are."""
    x = samples.detach().to(torch.float64)
    points = chains.points(x, norm, FRACTIONS, LADDER, LONGEST)
    points = points.reshape(len(x), -1, *x.shape[1:])
    points = points if domain is None else domain.project(points)
    values, loose, ends = chains.best_quotients(points, norm, _TIGHT)
    return Secants(values, ends.reshape(len(x), 2, *x.shape[1:]), loose)


def _block_by_block(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    samples: Tensor,
    *,
    norm: Norm,
    memory: int,
    domain: Domain | None,
    in_norm: bool,
) -> Secants:
    """Through torch, and natively on the CPU: networks that fit into memory at a time."""
    fitting = int(memory // bytes_per_network(plan, COUNT))
    together = STACKED // max(1, bytes_of_parameters(plan))
    chain = native_chain(plan, tensors, samples)
    most = together if chain is None else _NATIVE
    block = max(1, min(fitting, most if samples.is_cpu else fitting))
    work = len(tensors) * COUNT * bytes_of_parameters(plan) // 8
    workers = native_workers() if work > _SHARED else 1
    parts = []
    with one_thread() if together > 1 else nullcontext(), plain_arithmetic():
        for start in range(0, len(tensors), block):
            own = tensors if block >= len(tensors) else tensors[start : start + block]
            x = samples[start : start + block].detach().to(torch.float64).clone()
            networks = networks_of(plan, own, chain, workers)
            points, pairs = points_around(networks, x, norm)
            points = points if domain is None else domain.project(points)
            # Of a network that exceeds the memory alone, few points at a time.
            count = max(1, int(memory // (32 * len(x) * activations_of(plan) + 1)))
            values, loose = _proved(
                plan, own, networks, points, pairs, norm=norm, count=count, in_norm=in_norm
            )
            best = values.argmax(1)
            rows = torch.arange(len(best), device=best.device)
            ends = [points[rows, side[best]] for side in pairs]
            parts.append((values[rows, best], torch.stack(ends, 1), loose))
    values, points, loose = (torch.cat(sides) for sides in zip(*parts, strict=True))
    return Secants(values, points, loose)


def certified_quotient(
    plan: Architecture, tensors: Mapping[str, Tensor], pair: Tensor, *, norm: Norm = 2
) -> tuple[float, Tensor]:
    """``||f(a) - f(b)|| / ||a - b||`` for two given points (2, *shape), rounded down.

    0 where the points coincide or nothing can be proved.
    """
    with plain_arithmetic():
        points = pair.detach().to(torch.float64).clone().unsqueeze(0)
        networks = networks_of(plan, [tensors], native_chain(plan, [tensors], pair), workers=1)
        first = torch.zeros(1, dtype=torch.int64, device=points.device)
        indices = (first, first + 1)
        values, _ = _proved(
            plan, [tensors], networks, points, indices, norm=norm, count=2, in_norm=True
        )
        return float(values[0, 0]), points[0]


def _proved(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    networks: Networks,
    points: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    norm: Norm,
    count: int,
    in_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Certified quotients (networks, pairs), `count` points evaluated at a time; which are loose.

    Errors are bounded elementwise; of networks so deep that little is left, in norm as well.
    """
    parts = [networks.enclosures(some) for some in torch.split(points, count, 1)]
    outputs, errors = (torch.cat(sides, 1) for sides in zip(*parts, strict=True))
    moved = differences(points, outputs, pairs, norm)
    values = quotients(*moved, errors, pairs, norm)
    promised = quotients(*moved, torch.zeros_like(errors), pairs, norm)
    loose = values.amax(1) < _TIGHT * promised.amax(1)
    for network in loose.nonzero().flatten().tolist() if in_norm else ():
        own = points[network : network + 1]
        layers = layer_norms(plan, tensors[network])
        parts = [
            output_error_norms(plan, tensors[network], layers, some)
            for some in torch.split(own, count, 1)
        ]
        outputs, errors = (torch.cat(sides, 1) for sides in zip(*parts, strict=True))
        moved = differences(own, outputs, pairs, norm)
        proved = quotients_in_norm(*moved, errors, pairs, norm)
        values[network] = torch.maximum(values[network], proved[0])
    return values, loose

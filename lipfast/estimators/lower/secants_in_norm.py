"""Certified secants of networks on a device whose elementwise errors leave little, without a look.

Part of the proof of every certified lower bound: errors in norm of many networks (`error_norms`)
are put together on the host from numbers that come with their layers' norms, in one wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.lower.error_norms import ErrorNormsLater, layer_norms_of_each
from lipfast.estimators.lower.networks import activations_of, bytes_per_network, networks_of
from lipfast.estimators.lower.points import COUNT, points_around
from lipfast.estimators.lower.quotients import (
    differences,
    lengths_of_changes,
    quotients,
    quotients_of_lengths,
)
from lipfast.estimators.lower.secants import Secants, certified_secants
from lipfast.norms import Norm
from lipfast.ops.fetched import Fetched, sent
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture


def secants_in_norm(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    samples: Tensor,
    *,
    norm: Norm,
    memory: int,
    domain: Domain | None,
) -> Secants:
    """`certified_secants` of networks that are known to be loose, with errors bounded in norm.

    Waits for the device once for all networks that fit into the memory, to read their layers'
    norms. Where a node's own error depends on those of its operands, node by node.

    Args:
        plan: the architecture; every op must have an error rule.
        tensors: checked parameters of each network.
        samples: (networks, *shape), on a device.
        norm: 1, 2 or inf.
        memory: bytes.
        domain: both points of a secant are moved into it.
    """
    if not ErrorNormsLater.takes(plan):
        return certified_secants(plan, tensors, samples, norm=norm, memory=memory, domain=domain)
    block = max(1, int(memory // bytes_per_network(plan, COUNT)))
    values: list[float] = []
    ends = []
    with plain_arithmetic():
        for start in range(0, len(tensors), block):
            own = tensors[start : start + block]
            x = samples[start : start + block].detach().to(torch.float64).clone()
            networks = networks_of(plan, own, None, workers=1)
            points, pairs = points_around(networks, x, norm)
            points = points if domain is None else domain.project(points)
            # Of a network that exceeds the memory alone, few points at a time.
            count = max(1, int(memory // (32 * len(x) * activations_of(plan) + 1)))
            parts = torch.split(points, count, 1)
            elementwise = [networks.enclosures(some) for some in parts]
            outputs, errors = (torch.cat(sides, 1) for sides in zip(*elementwise, strict=True))
            known = quotients(*differences(points, outputs, pairs, norm), errors, pairs, norm)
            later = [ErrorNormsLater(plan, own, some) for some in parts]
            outputs = torch.cat([part.outputs for part in later], 1)
            change, distance = differences(points, outputs, pairs, norm)
            lengths = lengths_of_changes(change, norm)
            read = Fetched([known, lengths, distance, *pairs, *(part.numbers for part in later)])
            layers = layer_norms_of_each(plan, own)
            known, lengths, distance, *rest = read.read()
            ends_of = rest[0], rest[1]
            found = [part.errors(layers, got) for part, got in zip(later, rest[2:], strict=True)]
            proved = quotients_of_lengths(
                lengths, distance, torch.cat(found, 1), ends_of, change.shape[-1], norm=norm
            )
            best, places = torch.maximum(known, proved).max(1)
            values += best.tolist()
            rows = torch.arange(len(x), device=x.device)
            chosen = (sent(side[places], x.device) for side in ends_of)
            ends.append(torch.stack([points[rows, side] for side in chosen], 1))
    joined = torch.cat(ends)
    numbers = sent(torch.tensor(values, dtype=torch.float64, device="cpu"), joined.device)
    return Secants(numbers, joined, torch.zeros_like(numbers), values)

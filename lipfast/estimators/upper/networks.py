"""The graphs that networks are bounded by, and the parameters that are new in them.

Part of the proof: it says which networks a graph with merged maps stands for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError
from lipfast.graph.nodes import computed_name, error_name
from lipfast.ops.fetched import Fetched
from lipfast.plan.architecture import Architecture
from lipfast.plan.fold import FoldedGraph
from lipfast.plan.stacked import ResolvedNetworks

# A merged matrix whose rounding is beyond this part of its entries is not taken.
_ACCURATE = 1e-9


@dataclass(frozen=True)
class Group:
    """Networks that are bounded by one graph.

    Attributes:
        folded: the graph.
        networks: which of all.
        parameters: theirs, with those that are new in the graph.
        right: for each whether the graph is its; on its way from a device, or known.
    """

    folded: FoldedGraph
    networks: Sequence[int]
    parameters: ResolvedNetworks
    right: Fetched | None = None

    def doubtful(self) -> list[int]:
        """Networks that the graph is not right for."""
        if self.right is None:
            return []
        (right,) = self.right.read()
        return [index for index, own in zip(self.networks, right.tolist(), strict=True) if not own]


def prepared(
    plan: Architecture,
    networks: ResolvedNetworks,
    *,
    simplify: bool,
    apart: Collection[int] | None = None,
) -> list[Group]:
    """The graphs for all networks.

    Affine maps whose product leaves the range of float64, or is mostly rounding, are not merged.
    On a device no number is looked at: `Group.doubtful` says later which networks this was wrong
    for.

    Args:
        plan: the architecture.
        networks: resolved.
        simplify: fold and merge.
        apart: networks that an earlier call was wrong for.

    Raises:
        NonFiniteError: a BatchNorm cannot be folded.
    """
    folded = plan.folded if simplify else plan.joined
    indices = list(range(len(networks)))
    if not networks:
        return []
    if not folded.maps and not folded.merged:
        return [Group(folded, indices, networks)]
    if not all(tensor.is_cpu for tensor in networks[0].values()):
        if apart is None:
            found = _all_folded(plan, folded, networks)
            if found is not None:
                parameters, right = found
                return [Group(folded, indices, parameters, Fetched([right]))]
        elif folded.merged:
            return _apart(plan, folded, networks, sorted(apart))
    if not folded.merged:
        return [Group(folded, indices, _each_folded(plan, folded, networks, indices))]
    own = {index: _with_merged_maps(plan, folded, networks[index]) for index in indices}
    kept = {index: entry for index, entry in own.items() if entry is not None}
    others = [index for index in indices if index not in kept]
    groups = [Group(folded, list(kept), ResolvedNetworks(kept.values()))] if kept else []
    return groups + _unmerged(plan, networks, others)


def _all_folded(
    plan: Architecture, folded: FoldedGraph, networks: ResolvedNetworks
) -> tuple[ResolvedNetworks, Tensor] | None:
    """All networks by one graph, and for each whether it is right; None: one by one."""
    found = folded.parameters_together(networks, plan.constants)
    if found is None:
        return None
    parameters, right = found
    for node in folded.merged:
        right = right & _accurate(parameters, computed_name(node.name), start=1)
    return networks.with_tensors(parameters), right


def _apart(
    plan: Architecture, folded: FoldedGraph, networks: ResolvedNetworks, apart: Sequence[int]
) -> list[Group]:
    """Networks that are not merged apart from the others, which are known to be."""
    others = [index for index in range(len(networks)) if index not in set(apart)]
    groups = []
    if others:
        found = _all_folded(plan, folded, networks.some(others))
        assert found is not None
        groups.append(Group(folded, others, found[0]))
    return groups + _unmerged(plan, networks, apart)


def _unmerged(plan: Architecture, networks: ResolvedNetworks, chosen: Sequence[int]) -> list[Group]:
    if not chosen:
        return []
    parameters = _each_folded(plan, plan.unmerged, networks.some(chosen), chosen)
    return [Group(plan.unmerged, chosen, parameters)]


def _each_folded(
    plan: Architecture, folded: FoldedGraph, networks: ResolvedNetworks, indices: Sequence[int]
) -> ResolvedNetworks:
    if not folded.maps:
        return networks
    wheres = [f"state dict {index}: " for index in indices]
    return ResolvedNetworks(
        {**entry, **folded.parameters(entry, plan.constants, where)}
        for entry, where in zip(networks, wheres, strict=True)
    )


def _with_merged_maps(
    plan: Architecture, folded: FoldedGraph, entry: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    """The parameters of a graph with merged maps; None where they are not to be merged."""
    with suppress(NonFiniteError):
        parameters = {**entry, **folded.parameters(entry, plan.constants)}
        names = (computed_name(node.name) for node in folded.merged)
        if all(bool(_accurate(parameters, name)) for name in names):
            return parameters
    return None


def _accurate(parameters: Mapping[str, Tensor], name: str, start: int = 0) -> Tensor:
    """Whether the rounding of a merged matrix is far below its entries; biases do not matter.

    Args:
        parameters: of one network, or of many, (N, *shape) each.
        name: of the matrix.
        start: dimensions before those of the matrix.
    """
    weight, error = parameters[name], parameters.get(error_name(name))
    if weight.dim() - start < 2 or error is None or error.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=weight.device)
    largest = [value.flatten(start).amax(-1) for value in (error, weight.abs())]
    return largest[0] <= _ACCURATE * largest[1]

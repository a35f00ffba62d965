"""Slopes on a domain of many networks, found when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.upper.local.ranges import slopes_on_domain
from lipfast.estimators.upper.quadratic.graph_problem import EntrySlopes, entry_key
from lipfast.graph.nodes import Node
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks


class LocalSlopes:
    """Ranges of slopes of some networks on a domain.

    Args:
        plan: the architecture.
        networks: their parameters.
        domain: of the inputs; None for all inputs, of which rules say all.
        memory: bytes that one matrix of a network may take.
    """

    def __init__(
        self, plan: Architecture, networks: ResolvedNetworks, domain: Domain | None, memory: int
    ) -> None:
        self._plan, self._networks, self._domain, self._memory = plan, networks, domain, memory

    @property
    def known(self) -> bool:
        """Whether there is a domain, and the networks are not on a device."""
        if self._domain is None or not self._networks:
            return False
        return all(tensor.is_cpu for tensor in self._networks[0].values())

    @cached_property
    def of_all(self) -> Sequence[EntrySlopes]:
        """Of each network; nothing where nothing is known."""
        if self._domain is None or not self.known:
            return [{} for _ in self._networks]
        return [
            slopes_on_domain(self._plan, entry, self._domain, memory=self._memory)
            for entry in self._networks
        ]

    def of_node(self, node: Node, known: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of all networks, (networks, entries), where one knows more than `known` says.

        Args:
            node: a pointwise one.
            known: its slopes everywhere, (1 or networks, entries).
        """
        found = [own.get(entry_key(node)) for own in self.of_all]
        if all(own is None for own in found):
            return known
        count = len(found)
        before = [end.expand(count, -1).unbind() for end in known]
        rows = [
            own or (low, high) for own, low, high in zip(found, before[0], before[1], strict=True)
        ]
        lower, upper = (torch.stack(side) for side in zip(*rows, strict=True))
        return torch.maximum(lower, known[0]), torch.minimum(upper, known[1])

"""State dicts on a device: what their numbers must be is looked at later, with the results.

A look makes the host wait. What an architecture asks of the numbers of any number of networks, and
of what is computed of them, is asked on the device, and the answer comes with the next wait. Where
something is wrong, networks are looked at one by one, as on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops.fetched import Fetched, sent
from lipfast.plan.architecture import Architecture
from lipfast.plan.computed import evaluate_together
from lipfast.plan.masks import all_visible
from lipfast.plan.requirements import Requirements
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import largest_magnitudes, require_dense_numbers
from lipfast.rules.registry import rule_of


@dataclass(frozen=True)
class Resolved:
    """Networks that fit an architecture, if what is on its way says so.

    Attributes:
        networks: their tensors, computed ones included.
        checks: what says whether all is right; None: it is.
        carefully: resolves networks one by one, and raises what is wrong with one.
    """

    networks: ResolvedNetworks
    checks: Checks | None
    carefully: Callable[[], ResolvedNetworks]

    def hold(self) -> bool:
        """Whether all is right; waits for the device if nothing has waited since."""
        return self.checks is None or self.checks.hold()

    def settled(self) -> ResolvedNetworks:
        """The networks, which are right.

        Raises:
            NonFiniteError, StateDictError, TraceError: one is not.
        """
        return self.networks if self.hold() else self.carefully()


def resolved_on_device(
    architecture: Architecture,
    networks: ResolvedNetworks,
    names: Sequence[Sequence[str]],
    carefully: Callable[[], ResolvedNetworks],
) -> Resolved:
    """Networks of which names, shapes and devices are right: their numbers, and what is computed.

    Nothing is waited for: what is computed of numbers that are not right is to be thrown away.

    Args:
        architecture: what they must fit.
        networks: at least one.
        names: for each, or for all, of the tensors that must be finite numbers.
        carefully: see `Resolved`.
    """
    look = _Look(architecture.requirements, networks, names)
    flags: list[Tensor] = []
    found = None
    try:
        if architecture.computed:
            found = evaluate_together(architecture.computed, networks, architecture.constants)
    except Exception:  # perhaps of numbers that nothing should be made of
        if Checks(look, flags).hold():
            raise
    if architecture.computed:
        if found is None:
            return Resolved(carefully(), None, carefully)
        networks = networks.with_tensors(found[0])
        flags.append(found[1])
    if _may_hide(architecture):
        visible = all_visible(architecture.graph, networks, architecture.constants)
        flags += [] if visible is None else [visible]
    return Resolved(networks, Checks(look, flags), carefully)


def _may_hide(architecture: Architecture) -> bool:
    """Whether there is a softmax, and a mask that may leave it no entry."""
    required = architecture.requirements
    return (required.hides_entries or bool(required.masks)) and any(
        rule_of(node.op).maskable for node in architecture.graph.nodes
    )


class Checks:
    """What networks on a device are taken to be, on its way to the host.

    Args:
        look: at their numbers.
        flags: true values where what was computed of them is right.
    """

    def __init__(self, look: _Look, flags: Sequence[Tensor]) -> None:
        self._look, self._read = look, Fetched([*look.numbers, *flags])

    def hold(self) -> bool:
        """Whether they are; waits for the device if nothing has waited since."""
        found = self._read.read()
        count = len(self._look.numbers)
        return self._look.fine(found[:count]) and all(bool(flag.all()) for flag in found[count:])


class _Look:
    """A look at the numbers of networks.

    Attributes:
        numbers: what is to be read.
    """

    def __init__(
        self, required: Requirements, networks: ResolvedNetworks, names: Sequence[Sequence[str]]
    ) -> None:
        used = dict.fromkeys(name for own in names for name in own)
        masks = [name for name in used if name in required.masks]
        largest = largest_magnitudes(_finite_ones(networks, names, required))
        read = [networks.together(name) for name in masks]
        highest = [mask.amax().double() for mask in read if mask.numel()]
        equal = [
            (
                networks.together(name).double()
                == sent(constant.tensor().double(), _device(networks))
            )
            .all()
            .double()
            for name, constant in required.values.items()
        ]
        self._largest, self._highest = len(largest), len(highest)
        self.numbers = [*largest, *([torch.stack([*highest, *equal])] if highest or equal else [])]

    def fine(self, numbers: Sequence[Tensor]) -> bool:
        """Whether the numbers are what an architecture requires, from `numbers` on the host."""
        if not all(bool(torch.isfinite(own).all()) for own in numbers[: self._largest]):
            return False
        rest = [value for own in numbers[self._largest :] for value in own.tolist()]
        # NaN is not below, either.
        return all(high < math.inf for high in rest[: self._highest]) and all(rest[self._highest :])


def _device(networks: ResolvedNetworks) -> torch.device:
    return next(iter(networks[0].values())).device


def _finite_ones(
    networks: ResolvedNetworks, names: Sequence[Sequence[str]], required: Requirements
) -> list[Tensor]:
    """All tensors that must be finite; those of a name as one where they lie together."""
    found = []
    for entry, own in zip(networks, names, strict=False):
        for name in own:
            tensor = entry[name]
            if len(names) == 1 and networks.lies_together(name):
                tensor = networks.together(name)
            require_dense_numbers(tensor, name, "")
            if name not in required.masks:
                found.append(tensor.float() if tensor.element_size() == 1 else tensor)
    return found

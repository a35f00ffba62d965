"""State dicts on a device: one look at what their numbers must be, and checks that come later.

A look makes the host wait. What an architecture asks of the numbers of any number of networks is
asked once for all of them; what is computed of them is checked on the device, and the answer comes
with the next wait. Where something is wrong, networks are looked at one by one, as on the CPU.
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


@dataclass(frozen=True)
class Resolved:
    """Networks that fit an architecture, if what is on its way says so.

    Attributes:
        networks: their tensors, computed ones included.
        checks: true values where all is right.
        carefully: resolves networks one by one, and raises what is wrong with one.
    """

    networks: ResolvedNetworks
    checks: Fetched | None
    carefully: Callable[[], ResolvedNetworks]

    def hold(self) -> bool:
        """Whether all is right; waits for the device if nothing has waited since."""
        if self.checks is None:
            return True
        return all(bool(flags.all()) for flags in self.checks.read())

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

    Args:
        architecture: what they must fit.
        networks: at least one.
        names: for each, or for all, of the tensors that must be finite numbers.
        carefully: see `Resolved`.
    """
    look = _Look(architecture.requirements, networks, names)
    if not look.fine:
        return Resolved(carefully(), None, carefully)
    checks: list[Tensor] = []
    if architecture.computed:
        found = evaluate_together(architecture.computed, networks, architecture.constants)
        if found is None:
            return Resolved(carefully(), None, carefully)
        networks = networks.with_tensors(found[0])
        checks.append(found[1])
    computed_masks = architecture.requirements.masks - set(architecture.stored_parameters)
    if look.hides or architecture.requirements.hides_entries or computed_masks:
        visible = all_visible(architecture.graph, networks, architecture.constants)
        checks += [] if visible is None else [visible]
    return Resolved(networks, Fetched(checks) if checks else None, carefully)


class _Look:
    """One look at the numbers of networks.

    Attributes:
        fine: whether they are what an architecture requires.
        hides: whether a mask holds -inf.
    """

    def __init__(
        self, required: Requirements, networks: ResolvedNetworks, names: Sequence[Sequence[str]]
    ) -> None:
        used = dict.fromkeys(name for own in names for name in own)
        masks = [name for name in used if name in required.masks]
        largest = largest_magnitudes(_finite_ones(networks, names, required))
        read = [networks.together(name) for name in masks]
        read = [mask for mask in read if mask.numel()]
        ends = [end.double() for mask in read for end in (mask.amin(), mask.amax())]
        equal = [
            (
                networks.together(name).double()
                == sent(constant.tensor().double(), _device(networks))
            )
            .all()
            .double()
            for name, constant in required.values.items()
        ]
        parts = [*largest, *([torch.stack([*ends, *equal])] if ends or equal else [])]
        together = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None
        found = [] if together is None else together.tolist()
        count = len(found) - len(ends) - len(equal)
        self.hides = any(low == -math.inf for low in found[count : count + len(ends) : 2])
        self.fine = (
            all(map(math.isfinite, found[:count]))
            and all(high < math.inf for high in found[count : count + len(ends)])
            and all(found[count + len(ends) :])
        )


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

"""How large the activations of a network can be on a domain.

Part of the proof of upper bounds with products of activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import enclose_nodes, missing_error_rules
from lipfast.graph.nodes import Node, Reference, error_name
from lipfast.norms import Norm
from lipfast.ops.fetched import Fetched, sent
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import device_of, stack
from lipfast.rounding import widened
from lipfast.rules.magnitude import Magnitude, numbers_of_tensors, of_numbers, of_tensor
from lipfast.rules.upward import Upward, p_norm


class Sizes:
    """Magnitudes of the nodes of one network, collected in the order of the graph.

    Every activation f is bounded twice: by its rule, from the magnitudes of its operands, and on a
    domain with centre c and radius r by ``|f(x)_i| <= |f(c)_i| + L(f) r``, with f(c) evaluated with
    running error bounds.

    Args:
        plan: the architecture.
        known: of its parameters and, by the names of nodes, of the activations at the centre.
        norm: 1, 2 or inf.
        domain: of the inputs.
    """

    def __init__(
        self,
        plan: Architecture,
        known: Mapping[Reference, Magnitude],
        norm: Norm,
        domain: Domain | None,
    ) -> None:
        self._plan = plan
        self._norm = norm
        self._known = known
        self._found: dict[str, Magnitude] = {}
        self._radius = Upward(math.inf)
        if domain is None:
            self._found = {node.name: Magnitude() for node in plan.graph.inputs}
            return
        radii = [Upward.of(domain.reach(shape, norm)) for shape in plan.input_shapes]
        self._radius = p_norm(radii, norm)
        for node, radius in zip(plan.graph.inputs, radii, strict=True):
            centre = of_tensor(domain.middle(node.shape))
            found = self._around(centre, radius, node.shape)
            largest = domain.largest(node.shape)
            if largest is not None:
                found = found.tightened(of_tensor(largest)).within(node.shape)
            self._found[node.name] = found

    def of(self, reference: Reference) -> Magnitude:
        """Magnitude of an operand."""
        if reference.kind == "node":
            return self._found[reference.name]
        if reference.kind == "parameter":
            return self._known[reference]
        return of_tensor(self._plan.constants[reference.name].tensor())

    def add(self, node: Node, constant: Upward, own: Magnitude) -> None:
        """Note a node's magnitude: what its rule says, or what its constant and the domain say."""
        centre = self._known.get(Reference("node", node.name))
        if centre is not None and not constant.unbounded:
            own = own.tightened(self._around(centre, constant * self._radius, node.shape))
        self._found[node.name] = own.within(node.shape)

    def _around(self, centre: Magnitude, reach: Upward, shape: tuple[int, ...]) -> Magnitude:
        """Magnitude of everything within the distance `reach` (in the norm of the bound)."""
        count = Upward.of(float(math.prod(shape))).square_root()
        euclidean = reach * count if math.isinf(self._norm) else reach
        moved = Magnitude(reach, euclidean, euclidean)
        return centre.within(shape).plus(moved.within(shape)).within(shape)


class SizesLater:
    """`Sizes` of many networks, whose numbers are on their way from a device.

    Args:
        plan: the architecture.
        networks: with their parameters.
        references: tensors of which magnitudes are asked.
        norm: 1, 2 or inf.
        domain: of the inputs.
    """

    def __init__(
        self,
        plan: Architecture,
        networks: ResolvedNetworks,
        references: Iterable[Reference],
        norm: Norm,
        domain: Domain | None,
    ) -> None:
        self._make = partial(Sizes, plan, norm=norm, domain=domain)
        parameters = [ref for ref in dict.fromkeys(references) if ref.kind == "parameter"]
        # On the CPU one by one: products of many networks at once are rounded in another order.
        on_cpu = device_of(networks[0]).type == "cpu"
        groups = [ResolvedNetworks([entry]) for entry in networks] if on_cpu else [networks]
        self._groups = [_Numbers(plan, group, parameters, domain) for group in groups]

    def read(self) -> list[Sizes]:
        """One per network."""
        return [self._make(known) for group in self._groups for known in group.read()]


class _Numbers:
    """What the magnitudes of parameters, and of activations at the centre, are made of."""

    def __init__(
        self,
        plan: Architecture,
        networks: ResolvedNetworks,
        parameters: Sequence[Reference],
        domain: Domain | None,
    ) -> None:
        tensors: dict[Reference, Tensor] = {}
        for reference in parameters:
            name, error = reference.name, error_name(reference.name)
            found = networks.tensors([name, error])
            value = found[name]
            if error in found:
                value = value.abs() + widened(found[error], 4)
            tensors[reference] = value
        if domain is not None and not missing_error_rules(plan):
            tensors |= _at_centre(plan, networks, domain)
        self._count = len(networks)
        self._sizes = {reference: value[0].numel() for reference, value in tensors.items()}
        self._numbers = Fetched([numbers_of_tensors(value) for value in tensors.values()])

    def read(self) -> list[dict[Reference, Magnitude]]:
        """One mapping per network; of activations that are not finite nothing is known."""
        found: list[dict[Reference, Magnitude]] = [{} for _ in range(self._count)]
        pairs = zip(self._sizes.items(), self._numbers.read(), strict=True)
        for (reference, size), numbers in pairs:
            for known, own in zip(found, numbers.tolist(), strict=True):
                if reference.kind == "parameter" or math.isfinite(own[0]):
                    known[reference] = of_numbers(own, size)
        return found


def _at_centre(
    plan: Architecture, networks: ResolvedNetworks, domain: Domain
) -> dict[Reference, Tensor]:
    """How large every activation is at the centre of the domain, (N, *shape) each."""
    with plain_arithmetic():
        stacked = stack(networks, plan.used_parameters, torch.float64)
        shape = len(networks), 1
        points = [
            sent(domain.middle(own), device_of(stacked)).expand(*shape, *own).clone()
            for own in plan.input_shapes
        ]
        values, errors = enclose_nodes(plan, stacked, points)
        return {
            Reference("node", name): widened((value.abs() + errors[name])[:, 0], 4)
            for name, value in values.items()
        }

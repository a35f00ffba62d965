"""How large the activations of a network can be on a domain.

Part of the proof of upper bounds with products of activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import enclose_nodes, missing_error_rules
from lipfast.graph.nodes import Node, Reference, error_name
from lipfast.norms import Norm
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.state import device_of, stack
from lipfast.rounding import widened
from lipfast.rules.magnitude import Magnitude, of_tensor
from lipfast.rules.upward import Upward, p_norm


class Sizes:
    """Magnitudes of the nodes of one network, collected in the order of the graph.

    Every activation f is bounded twice: by its rule, from the magnitudes of its operands, and on a
    domain with centre c and radius r by ``|f(x)_i| <= |f(c)_i| + L(f) r``, with f(c) evaluated with
    running error bounds.
    """

    def __init__(
        self,
        plan: Architecture,
        parameters: Mapping[str, Tensor],
        norm: Norm,
        domain: Domain | None,
    ) -> None:
        self._plan = plan
        self._norm = norm
        self._found: dict[str, Magnitude] = {}
        self._radius = Upward(math.inf)
        self._centres: dict[str, Magnitude] = {}
        if domain is None:
            self._found = {node.name: Magnitude() for node in plan.graph.inputs}
            return
        radii = [Upward.of(domain.reach(shape, norm)) for shape in plan.input_shapes]
        self._radius = p_norm(radii, norm)
        if not missing_error_rules(plan):
            self._centres = _at_centre(plan, parameters, domain)
        for node, radius in zip(plan.graph.inputs, radii, strict=True):
            centre = of_tensor(domain.middle(node.shape))
            found = self._around(centre, radius, node.shape)
            largest = domain.largest(node.shape)
            if largest is not None:
                found = found.tightened(of_tensor(largest)).within(node.shape)
            self._found[node.name] = found

    def of(self, reference: Reference, parameters: Mapping[str, Tensor]) -> Magnitude:
        """Magnitude of an operand."""
        if reference.kind == "node":
            return self._found[reference.name]
        if reference.kind == "parameter":
            value = parameters[reference.name]
            error = parameters.get(error_name(reference.name))
            return of_tensor(value if error is None else value.abs() + widened(error, 4))
        return of_tensor(self._plan.constants[reference.name].tensor())

    def add(self, node: Node, constant: Upward, own: Magnitude) -> None:
        """Note a node's magnitude: what its rule says, or what its constant and the domain say."""
        if node.name in self._centres and not constant.unbounded:
            reach = self._around(self._centres[node.name], constant * self._radius, node.shape)
            own = own.tightened(reach)
        self._found[node.name] = own.within(node.shape)

    def _around(self, centre: Magnitude, reach: Upward, shape: tuple[int, ...]) -> Magnitude:
        """Magnitude of everything within the distance `reach` (in the norm of the bound)."""
        count = Upward.of(float(math.prod(shape))).square_root()
        euclidean = reach * count if math.isinf(self._norm) else reach
        moved = Magnitude(reach, euclidean, euclidean)
        return centre.within(shape).plus(moved.within(shape)).within(shape)


def _at_centre(
    plan: Architecture, parameters: Mapping[str, Tensor], domain: Domain
) -> dict[str, Magnitude]:
    """Magnitude of every activation at the centre of the domain."""
    with plain_arithmetic():
        stacked = stack([parameters], plan.used_parameters, torch.float64)
        device = device_of(stacked)
        points = [
            domain.middle(shape)[None, None].to(device, copy=True) for shape in plan.input_shapes
        ]
        values, errors = enclose_nodes(plan, stacked, points)
        found = {}
        for name, value in values.items():
            size = widened((value.abs() + errors[name])[0, 0], 4)
            if bool(torch.isfinite(size).all()):
                found[name] = of_tensor(size)
        return found

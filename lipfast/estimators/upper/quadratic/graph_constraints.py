"""What is known of one activation: slopes entry by entry, or one constant for whole vectors.

Part of the proof: an op that reads several activations has a constant for each of them, so that it
counts as a sum of ops that read one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast.errors import naming
from lipfast.estimators.upper.quadratic.boxes import boxes_of
from lipfast.estimators.upper.quadratic.graph_room import QuadraticBoundError
from lipfast.estimators.upper.sizes import Sizes
from lipfast.estimators.upper.sweep import ITSELF, ZERO, Step, Sweep
from lipfast.graph.nodes import Constant, error_name
from lipfast.plan.architecture import Architecture
from lipfast.rounding import widened
from lipfast.rules.magnitude import Magnitude, of_tensor
from lipfast.rules.registry import Call
from lipfast.rules.upward import Upward

# A rule is asked for constants of these sizes as well: its answers must be proportional.
_TRIED_SCALES = (2.0**-20, 2.0**20)
_PROPORTIONAL = 1e-9
# Constants beyond are not looked at: their squares, times weights, would leave float64.
_LARGEST_SLOPE = 2.0**100
_ENDLESS = Upward(math.inf)


@dataclass(frozen=True, eq=False)
class Constraint:
    r"""What holds for an activation a of v, for each pair of inputs.

    Either, unit by unit, $da_j = \sigma_j dv_j$ with $\sigma_j^2 - 2 m_j \sigma_j + p_j \le 0$; or
    $\|da\| \le l \|dv\|$ for whole vectors, whose sizes may differ.

    Attributes:
        means: m, one per unit; None for whole vectors.
        products: p, one per unit; for whole vectors $-l^2$, one number.
        slopes: about the largest size of a slope, one per unit or one number; no part of a proof.
        inputs: entries of v.
        outputs: entries of a.
    """

    means: Tensor | None
    products: Tensor
    slopes: Tensor
    inputs: int
    outputs: int

    @property
    def multipliers(self) -> int:
        """How many numbers D the constraint has."""
        return self.inputs if self.means is not None else 1


@dataclass(frozen=True, eq=False)
class RulesAsked:
    """Rules of one network's nodes, as the constraints ask them.

    Attributes:
        parameters: of the network.
        constants: of the plan.
        like: a float64 tensor on the device where matrices are.
        sizes: of activations, where products of them ask for these.
    """

    parameters: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    like: Tensor
    sizes: Sizes | None

    def slopes(self, step: Step) -> tuple[Tensor, Tensor] | None:
        """Ends of the slopes of a pointwise op, one per entry; None where its rule knows none."""
        rule, node = step.rule, step.node
        found = None
        with naming(node.op, node.module):
            if rule.slopes is not None:
                found = rule.slopes(self._call(step, [ITSELF]))
        if found is None and node.op == "lipfast.composition":
            constant = self.constants_of(step)[0]
            found = (-constant, constant)
        if found is None:
            return None
        lower, upper = (self._entries(step, end) for end in found)
        size = torch.maximum(lower.abs(), upper.abs())
        fits = bool(((lower <= upper) & (size <= _LARGEST_SLOPE)).all())
        return (lower, upper) if fits else None

    def _entries(self, step: Step, end: float | Tensor) -> Tensor:
        """One number per entry of the node, in one row."""
        # A number without a dtype would become a float32.
        tensor = torch.as_tensor(end, dtype=self.like.dtype, device=self.like.device)
        return tensor.expand(step.node.shape).reshape(-1).contiguous()

    def constants_of(self, step: Step) -> list[float]:
        """For each activation that a node reads a constant l, rounded up, of the op in it alone.

        Raises:
            QuadraticBoundError: there is none, or what the rule says is not proportional to those
                of the operands.
        """
        node = step.node
        if step.operation.layer is not None:
            raise QuadraticBoundError(f"{node.op} in module '{node.module}' has a rule of its own")
        found = []
        for operand in step.operation.operands:
            constant = self._alone(step, operand, ITSELF).value
            for scale in _TRIED_SCALES:
                other = self._alone(step, operand, Upward.of(scale)).value
                if not abs(other - scale * constant) <= _PROPORTIONAL * scale * constant:
                    raise QuadraticBoundError(
                        f"the rule of {node.op} in module '{node.module}' is not proportional to "
                        "the constants of its operands"
                    )
            if not constant <= _LARGEST_SLOPE:
                raise QuadraticBoundError(f"{node.op} in module '{node.module}' is too steep")
            found.append(constant)
        return found

    def _alone(self, step: Step, operand: str, constant: Upward) -> Upward:
        """What a node makes of one operand, if only that varies."""
        call = self._call(step, [constant if n == operand else ZERO for n in step.names])
        with naming(step.node.op, step.node.module):
            found = step.bound(call)
        if found.unbounded:
            raise QuadraticBoundError(
                call.reason or f"{step.node.op} in module '{step.node.module}' has no constant"
            )
        return found

    def _call(self, step: Step, operands: Sequence[Upward]) -> Call:
        unlayered = replace(step, operation=replace(step.operation, layer=None))
        call = unlayered.call(operands, (), self.parameters, self.constants, 2)
        if self.sizes is not None:
            call.magnitudes = [self.sizes.of(reference) for reference in step.references]
        return call


def sizes_for_all_inputs(
    plan: Architecture, sweep: Sweep, parameters: Mapping[str, Tensor]
) -> Sizes | None:
    """How large activations can be, whatever the inputs are; None where no rule asks for it."""
    if not sweep.needs_sizes:
        return None
    known = {}
    for reference in dict.fromkeys(ref for step in sweep.steps for ref in step.references):
        if reference.kind == "parameter":
            value = parameters[reference.name].detach().double().abs()
            error = parameters.get(error_name(reference.name))
            known[reference] = of_tensor(value if error is None else value + widened(error, 4))
    sizes = Sizes(plan, known, 2, None)
    layers = [math.inf] * len(sweep.layers)
    for step in sweep.steps:
        unknown = [_ENDLESS] * len(step.references)
        call = step.call(unknown, layers, parameters, plan.constants, 2)
        call.magnitudes = [sizes.of(reference) for reference in step.references]
        with naming(step.node.op, step.node.module):
            own = Magnitude() if step.rule.magnitude is None else step.rule.magnitude(call)
        sizes.add(step.node, _ENDLESS, own)
    return sizes


def of_slopes(lower: Tensor, upper: Tensor) -> Constraint:
    """The constraint of units whose slopes lie between two numbers each."""
    means, products = boxes_of(lower, upper)
    size = torch.maximum(lower.abs(), upper.abs())
    return Constraint(means, products, size, len(means), len(means))


def of_vectors(constant: float, inputs: int, outputs: int, like: Tensor) -> Constraint:
    """The constraint of an op with a Lipschitz constant l > 0; its square is rounded up."""
    square = math.nextafter(constant * constant, math.inf)
    products, slopes = (like.new_tensor([value]) for value in (-square, constant))
    return Constraint(None, products, slopes, inputs, outputs)

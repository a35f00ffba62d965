"""The Jacobians that slopes make: a graph with a linear map in the place of each activation.

Part of the proof of every floor: it says which units there are, between which ends their slopes
lie, and which graph maps a direction to what the Jacobian makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_linear import is_linear, without_constants
from lipfast.estimators.upper.quadratic.graph_problem import dependent_nodes, graph_of_slopes
from lipfast.estimators.upper.sweep import ITSELF, ZERO, Step, sweep_of
from lipfast.graph.nodes import Graph, Node, Reference
from lipfast.ops.fetched import sent
from lipfast.plan.architecture import Architecture
from lipfast.plan.constant_folding import REPEATED
from lipfast.plan.fold import FoldedGraph
from lipfast.plan.state import stack
from lipfast.rules.registry import rule_of, written_here

# What may read a tensor that does not depend on the input, of which the derivative is zero.
_MEETS_CONSTANTS = ("aten.cat", "aten.stack", "aten.add", "aten.sub")
# Ends beyond are not looked at: their products would leave float64.
_STEEPEST_SLOPE = 2.0**100


class NoSlopesError(Exception):
    """A network that has no floor; the message is the reason."""


@dataclass(frozen=True, eq=False)
class PatternUnits:
    """The units of one activation.

    Attributes:
        step: its node, in the graph that slopes are known of.
        source: name of the node that it reads.
        slopes: name of the parameter of the linear graph that holds their slopes.
    """

    step: Step
    source: str
    slopes: str

    @property
    def name(self) -> str:
        """Name of the activation's node."""
        return self.step.node.name

    @property
    def shape(self) -> tuple[int, ...]:
        """For one sample."""
        return self.step.node.shape


@dataclass(frozen=True, eq=False)
class LinearGraph:
    """An architecture whose function is linear, and what becomes of the parameters in it.

    Attributes:
        plan: activations are products with slopes, which are parameters; nothing is added.
        known: the graph that it was made of.
        units: of all activations, in order.
        zeros: names of parameters that are zeros -> what they stand for in the graph.
    """

    plan: Architecture
    known: Graph
    units: tuple[PatternUnits, ...]
    zeros: Mapping[str, Reference]

    def parameters(
        self, plan: Architecture, networks: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What either graph refers to but for slopes, stacked in float64: (N, *shape) each."""
        found = stack(networks, plan.used_parameters, torch.float64)
        like = next(iter(networks[0].values()), torch.zeros(()))
        for name in self.zeros:
            shape = self.plan.shapes[name]
            found[name] = torch.zeros(
                len(networks), *shape, dtype=torch.float64, device=like.device
            )
        return found

    def ends(
        self, plan: Architecture, networks: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Least and largest slopes of all units: (N, 1, *shape) in float64.

        Raises:
            NoSlopesError: a rule knows none for these parameters.
        """
        found = []
        for unit in self.units:
            reads = None in unit.step.names
            pairs = [_ends(unit, plan, own) for own in (networks if reads else networks[:1])]
            low, high = (torch.stack(side) for side in zip(*pairs, strict=True))
            shape = len(networks), 1, *unit.shape
            found.append((low.unsqueeze(1).expand(shape), high.unsqueeze(1).expand(shape)))
        return found


def linear_graph(plan: Architecture) -> LinearGraph:
    """The linear graph of an architecture.

    Raises:
        NoSlopesError: an op is neither linear nor has slopes.
    """
    if not written_here(rule_of("aten.mul")):
        raise NoSlopesError("the rule of aten.mul is not lipfast's own")
    graph = graph_of_slopes(plan)
    graph = graph.rewritten(graph.nodes)  # extrema leave behind what they were made of
    steps = {step.node.name: step for step in sweep_of(plan, FoldedGraph(graph, {})).steps}
    dependent = set(dependent_nodes(graph))
    units: list[PatternUnits] = []
    zeros: dict[str, Reference] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        read = list(dict.fromkeys(node.names("node")))
        operands = [name for name in read if name in dependent]
        if node.op == "input":
            nodes.append(node)
        elif node.op == REPEATED:  # the same for all samples
            nodes.append(_zeros_like_repeated(node, zeros))
        elif len(operands) < len(read) and node.op not in _MEETS_CONSTANTS:
            raise NoSlopesError(
                f"{node.op} in module '{node.module}' reads what does not depend on the input"
            )
        elif is_linear(node, operands):
            plain, own = without_constants(node)
            zeros |= own
            nodes.append(plain)
        else:
            unit = _units_of_node(steps[node.name], operands, graph)
            units.append(unit)
            args = Reference("node", unit.source), Reference("parameter", unit.slopes)
            nodes.append(replace(node, op="aten.mul", args=args, kwargs=()))
    if not dependent.intersection(graph.outputs):
        raise NoSlopesError("the output does not depend on the input")
    shapes = {name: _shape_of(plan, reference) for name, reference in zeros.items()}
    shapes |= {unit.slopes: unit.shape for unit in units}
    linear = Architecture(
        Graph(tuple(nodes), graph.outputs),
        {**plan.parameters, **shapes},
        {},
        plan.constants,
        plan.dtype,
        plan.computed,
        plan.given,
    )
    return LinearGraph(linear, graph, tuple(units), zeros)


def _zeros_like_repeated(node: Node, zeros: dict[str, Reference]) -> Node:
    repeated = node.reference(1)
    name = f"zeros like {repeated.kind} {repeated.name}"
    zeros[name] = repeated
    return replace(node, args=(node.args[0], Reference("parameter", name), *node.args[2:]))


def _units_of_node(step: Step, operands: Sequence[str], graph: Graph) -> PatternUnits:
    """Where an op has slopes: one for each entry of its only operand."""
    node = step.node
    alone = len(operands) == 1 and graph.node(operands[0]).shape == node.shape
    if step.rule.slopes is None or not alone:
        raise NoSlopesError(f"the rule of {node.op} in module '{node.module}' knows no slopes")
    return PatternUnits(step, operands[0], f"slopes of {node.name}")


def _ends(
    unit: PatternUnits, plan: Architecture, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    step = unit.step
    call = step.call([ZERO] * len(step.names), (), parameters, plan.constants, 2)
    found = None if step.rule.slopes is None else step.rule.slopes(call)
    where = f"{step.node.op} in module '{step.node.module}'"
    if found is None:
        raise NoSlopesError(f"the rule of {where} knows no slopes")
    like = next(iter(parameters.values()), torch.zeros(()))
    # Of a composition the constant may be known more closely than the slopes.
    operands = [ZERO if name is None else ITSELF for name in step.names]
    most = step.bound(step.call(operands, (), parameters, plan.constants, 2)).value
    low, high = (
        sent(torch.as_tensor(end, dtype=torch.float64), like.device)
        .expand(unit.shape)
        .clamp(-most, most)
        for end in found
    )
    if not bool(((low <= high) & (torch.maximum(-low, high) <= _STEEPEST_SLOPE)).all()):
        raise NoSlopesError(f"{where} is too steep")
    return low, high


def _shape_of(plan: Architecture, reference: Reference) -> tuple[int, ...]:
    if reference.kind == "parameter":
        return plan.shapes[reference.name]
    return plan.constants[reference.name].shape

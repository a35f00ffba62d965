"""The forward sweep: Lipschitz constants (or errors) carried through a graph, node by node.

Part of the proof of every upper bound: ``L(node)`` follows from the constants of the node's
operands by the rule of its op, and every operation on constants is rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary

from torch import Tensor

from lipfast.errors import naming
from lipfast.estimators.upper.composition import Composition, Contributions, Operation
from lipfast.estimators.upper.sizes import Sizes
from lipfast.graph.nodes import Constant, Node, Reference
from lipfast.norms import Norm
from lipfast.plan.architecture import Architecture
from lipfast.plan.fold import FoldedGraph
from lipfast.plan.layers import Layer
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import RULES, Call, Rule, lookup, written_here
from lipfast.rules.upward import Upward, p_norm

ZERO = Upward.of(0.0)
ITSELF = Upward.of(1.0)


@dataclass(frozen=True, eq=False)
class Step:
    """One node with its rule and operands, resolved once for all state dicts.

    Attributes:
        node: the node.
        rule: of its op.
        references: its tensor arguments.
        names: for each of them the node that it is; None for parameters and constants.
        shapes: of its tensor arguments; those of activations are for one sample.
        operation: the node as `Composition` knows it.
        asked_later: whether several operands meet, and lipfast's own rule sees nothing but them. A
            user's rule may read the state dict, which may change and should not be kept.
        one_by_one: norms for which the rule has to be asked once per network (see `together`).
    """

    node: Node
    rule: Rule
    references: tuple[Reference, ...]
    names: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    operation: Operation
    asked_later: bool
    one_by_one: set[Norm] = field(default_factory=set)

    def call(
        self,
        operands: Sequence[Upward],
        layers: Sequence[float],
        parameters: Mapping[str, Tensor],
        constants: Mapping[str, Constant],
        norm: Norm,
    ) -> Call:
        """What the rule sees, from the constants of its tensor arguments and all layers' norms."""
        layer = self.operation.layer
        size = 0.0 if layer is None else layers[layer]
        return Call(self.node, norm, operands, list(self.shapes), size, parameters, constants)

    def bound(self, call: Call) -> Upward:
        """What the rule answers."""
        result = self.rule.bound(call)
        return result if isinstance(result, Upward) else Upward.of(result)

    def alone(self, call: Call) -> dict[str, Upward]:
        """What the node makes of each of its operands if only that one varies."""
        found = {}
        for operand in self.operation.operands:
            pairs = zip(self.names, call.operands, strict=True)
            only = [constant if name == operand else ZERO for name, constant in pairs]
            found[operand] = self.bound(replace(call, operands=only))
        return found


@dataclass(frozen=True, eq=False)
class Sweep:
    """A graph of an architecture as bounds go through it: all that does not depend on weights.

    Attributes:
        layers: whose norms are needed.
        steps: every node but the inputs, in order.
        operations: all nodes as `Composition` knows them, inputs first.
        inputs: names of the inputs.
        outputs: names of the nodes that are results, in order; one may be there twice.
        needs_sizes: whether a product asks how large activations are.
    """

    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    needs_sizes: bool


_KNOWN: WeakKeyDictionary[FoldedGraph, Sweep] = WeakKeyDictionary()


def sweep_of(plan: Architecture, folded: FoldedGraph) -> Sweep:
    """The sweep of one of an architecture's graphs; made again only where a rule has changed."""
    known = _KNOWN.get(folded)
    if known is None or any(RULES.get(step.node.op) is not step.rule for step in known.steps):
        known = _KNOWN[folded] = _made(plan, folded)
    return known


def _made(plan: Architecture, folded: FoldedGraph) -> Sweep:
    layers = plan.layers if folded is plan.folded else plan.layers_of(folded)
    shapes = {node.name: node.shape for node in folded.graph.nodes}
    positions = {layer.node: layer.index for layer in layers}
    steps = tuple(
        _step(plan, node, shapes, positions.get(node.name))
        for node in folded.graph.nodes
        if node.op != "input"
    )
    inputs = plan.graph.inputs
    operations = [Operation(node.name, "input", node.module, ()) for node in inputs]
    return Sweep(
        layers,
        steps,
        (*operations, *(step.operation for step in steps)),
        tuple(node.name for node in inputs),
        tuple(plan.graph.outputs),
        any(step.rule.product is not None and step.rule.product(step.node) for step in steps),
    )


def _step(
    plan: Architecture, node: Node, shapes: Mapping[str, tuple[int, ...]], layer: int | None
) -> Step:
    def shape(reference: Reference) -> tuple[int, ...]:
        if reference.kind == "node":
            return shapes[reference.name]
        if reference.kind == "parameter":
            # What BatchNorms make of a weight is not in the state dict; no rule asks for its shape.
            return plan.shapes.get(reference.name, ())
        return plan.constants[reference.name].shape

    rule = lookup(node.op)
    own = written_here(rule)
    kinds = ("node", "parameter", "constant")
    references = tuple(ref for ref in node.references() if ref.kind in kinds)
    names = tuple(ref.name if ref.kind == "node" else None for ref in references)
    operands = tuple(dict.fromkeys(name for name in names if name is not None))
    return Step(
        node,
        rule,
        references,
        names,
        tuple(shape(reference) for reference in references),
        Operation(node.name, node.op, node.module, operands, layer, not own),
        own and None not in names,
    )


def composed(
    plan: Architecture,
    sweep: Sweep,
    parameters: Mapping[str, Tensor],
    layers: Sequence[float],
    *,
    norm: Norm,
    sizes: Sizes | None,
) -> tuple[Composition, list[str]]:
    """Carry ``L(node)`` through the graph, and magnitudes where a product needs them.

    Args:
        plan: the architecture.
        sweep: one of its graphs.
        parameters: of one network, with those that are new in the graph.
        layers: upper ends of the layers' norms.
        norm: 1, 2 or inf.
        sizes: magnitudes of the inputs, if the sweep needs any.

    Returns:
        The constants of all nodes and of the outputs together, and why some are infinite.
    """
    constants = dict.fromkeys(sweep.inputs, ITSELF)
    reasons: list[str] = []
    meetings: dict[str, Mapping[str, Upward] | Callable[[], Mapping[str, Upward]]] = {}
    for step in sweep.steps:
        name = step.node.name
        operands = [ZERO if name is None else constants[name] for name in step.names]
        call = step.call(operands, layers, parameters, plan.constants, norm)
        if sizes is not None:
            call.magnitudes = [sizes.of(reference) for reference in step.references]
        try:
            constants[name] = step.bound(call)
            if sizes is not None:
                own = Magnitude() if step.rule.magnitude is None else step.rule.magnitude(call)
                sizes.add(step.node, constants[name], own)
        except Exception:
            with naming(step.node.op, step.node.module):
                raise
        if call.reason is not None:
            reasons.append(f"{call.reason} (module '{step.node.module}')")
        if len(step.operation.operands) > 1:
            if step.asked_later:
                call.parameters, call.constants = {}, {}  # no weights are kept
                meetings[name] = partial(step.alone, call)
            else:
                meetings[name] = step.alone(call)
    outputs = plan.graph.outputs
    total = p_norm([constants[name] for name in outputs], norm)
    contributions = Contributions(meetings)
    return Composition(sweep.operations, constants, contributions, outputs, total), reasons

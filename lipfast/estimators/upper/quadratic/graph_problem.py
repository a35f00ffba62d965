"""A network as steps over the tensors that are alive: what a bound by quadratic constraints needs.

Part of the proof: each step says what an activation reads, which constraint holds for it, and what
is carried on. All between activations is linear and stands in the matrices of the steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_constraints import (
    Constraint,
    RulesAsked,
    of_slopes,
    of_vectors,
    sizes_for_all_inputs,
)
from lipfast.estimators.upper.quadratic.graph_linear import (
    Coefficients,
    Expression,
    LinearNodes,
    is_linear,
    joined_rows,
    scaled_rows,
    selected_rows,
)
from lipfast.estimators.upper.quadratic.graph_pools import without_max_pools
from lipfast.estimators.upper.quadratic.graph_room import Room, StepSizes
from lipfast.estimators.upper.sweep import Step, Sweep, sweep_of
from lipfast.graph.nodes import Graph, Node, Reference
from lipfast.plan.architecture import Architecture
from lipfast.plan.compositions import join_compositions
from lipfast.plan.extrema import join_extrema
from lipfast.plan.fold import FoldedGraph
from lipfast.plan.repeated import join_repeated
from lipfast.rules.registry import rule_of, written_here

EntrySlopes: TypeAlias = "Mapping[str, tuple[Tensor, Tensor]]"
"""By `entry_key` of pointwise nodes, ends of the slopes of all their entries in a row."""


def entry_key(node: Node) -> str:
    """Name and function of a node: in another graph one of its name may be of another operand."""
    return f"{node.name} {node.op} {node.args[1:]!r}"


class Units(NamedTuple):
    """The units of a pointwise node that a step is about.

    Attributes:
        step: the node.
        operand: name of what it reads.
        slopes: ends of all difference quotients of its entries.
        places: of the units among these.
    """

    step: Step
    operand: str
    slopes: tuple[Tensor, Tensor]
    places: Tensor


@dataclass(frozen=True, eq=False)
class GraphStep:
    """One step: ``v = C b``, an activation a of v, and ``b' = A b + B a`` for what is alive behind.

    Attributes:
        name: of the node, with the operand's position where it reads several.
        constraint: of a and v.
        read: C.
        kept: A; None for zero.
        added: B.
        before: sizes of the tensors that b consists of.
        behind: sizes of those that b' consists of.
        units: what the constraint is of; None where it is of whole vectors.
    """

    name: str
    constraint: Constraint
    read: Coefficients
    kept: Coefficients | None
    added: Coefficients
    before: tuple[int, ...]
    behind: tuple[int, ...]
    units: Units | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """All steps of one network.

    Attributes:
        inputs: sizes of the inputs, which are alive at first.
        steps: in order.
        output: all outputs together as a matrix of what is alive at the end; None where they do not
            depend on the inputs.
        outputs: sizes of the outputs.
        like: a float64 tensor on the device where the matrices are.
    """

    inputs: tuple[int, ...]
    steps: tuple[GraphStep, ...]
    output: Coefficients | None
    outputs: tuple[int, ...]
    like: Tensor


def in_single(problem: Problem) -> Problem:
    """The matrices in float32, for a search that need not be exact."""

    def single(matrix: Coefficients) -> Coefficients:
        return Coefficients(None if matrix.value is None else matrix.value.float())

    steps = []
    for step in problem.steps:
        own = step.constraint
        means = None if own.means is None else own.means.float()
        own = replace(own, means=means, products=own.products.float(), slopes=own.slopes.float())
        kept = None if step.kept is None else single(step.kept)
        read, added = single(step.read), single(step.added)
        steps.append(replace(step, constraint=own, read=read, kept=kept, added=added))
    output = None if problem.output is None else single(problem.output)
    return replace(problem, steps=tuple(steps), output=output, like=problem.like.float())


def problem_of(
    plan: Architecture,
    parameters: Mapping[str, Tensor],
    *,
    memory: int,
    operations: float = math.inf,
    evaluations: int = 0,
    slopes: EntrySlopes | None = None,
) -> Problem:
    """The steps of one network of an architecture.

    Args:
        plan: the architecture.
        parameters: of the network, resolved; those of folded layers are not looked at.
        memory: bytes that all matrices together may take, those of the search and the proof too.
        operations: multiplications and additions that these may take.
        evaluations: of the search.
        slopes: ranges of slopes on a domain; of other nodes their rules are asked.

    Raises:
        QuadraticBoundError: an op has no constant, or there is no room for a matrix.
    """
    room = Room(memory, operations, evaluations)
    graph = graph_of_slopes(plan, max_pools=True)
    sweep = sweep_of(plan, FoldedGraph(graph, {}))
    return _StepBuilder(plan, graph, sweep, parameters, room=room, slopes=slopes or {}).build()


def graph_of_slopes(plan: Architecture, *, max_pools: bool = False) -> Graph:
    """The graph whose activations have slopes: compositions joined, extrema as a ReLU each.

    With `max_pools`, these are maxima of pairs, and so a ReLU each.
    """
    graph = join_compositions(join_extrema(join_repeated(plan.graph)))
    graph = without_max_pools(graph) if max_pools else graph
    return join_repeated(_without_extrema(graph))


class _Pending(NamedTuple):
    """A step before it is known what is alive behind it."""

    name: str
    constraint: Constraint
    read: Coefficients
    base: tuple[int, ...]
    block: int
    units: Units | None = None


class _StepBuilder:
    def __init__(
        self,
        plan: Architecture,
        graph: Graph,
        sweep: Sweep,
        parameters: Mapping[str, Tensor],
        *,
        room: Room,
        slopes: EntrySlopes,
    ) -> None:
        self._nodes, self._graph, self._room, self._slopes = graph.nodes, graph, room, slopes
        self._steps = {step.node.name: step for step in sweep.steps}
        self._linear = LinearNodes(parameters, plan.constants, room)
        self._asked = RulesAsked(
            parameters,
            plan.constants,
            self._linear.like,
            sizes_for_all_inputs(plan, sweep, parameters),
        )
        self._dependent = dependent_nodes(graph)
        self._last = _last_readers(graph)
        self._shapes = {node.name: node.shape for node in graph.nodes}
        self._found: dict[str, Expression] = {}
        self._sizes: list[int] = []
        self._base: tuple[int, ...] = ()
        self._done: list[GraphStep] = []

    def build(self) -> Problem:
        """Steps in the order of the graph, linear nodes between them."""
        for node in self._graph.inputs:
            block = self._new_block(math.prod(node.shape))
            self._found[node.name] = {block: Coefficients()}
        inputs = tuple(self._sizes)
        self._base = tuple(range(len(inputs)))
        active = [at for at, node in enumerate(self._nodes) if self._is_active(node)]
        self._evaluate(0, active[0] if active else len(self._nodes))
        for at, end in itertools.pairwise([*active, len(self._nodes)]):
            pending = self._activation(self._nodes[at])
            cut = at
            if pending is not None:
                cut = min(range(at, end), key=lambda p: self._size_of(self._alive(p)))
                self._evaluate(at + 1, cut + 1)
                self._finish(pending, self._alive(cut))
                self._forget(cut)
            self._evaluate(cut + 1, end)
        outputs = self._graph.outputs
        parts = [(self._found[name], self._entries(name)) for name in outputs]
        found = None
        if any(expression for expression, _ in parts):
            found = joined_rows(parts, self._widths(self._base), self._linear.like)
        rows = tuple(map(self._entries, outputs))
        return Problem(inputs, tuple(self._done), found, rows, self._linear.like)

    def _is_active(self, node: Node) -> bool:
        operands = [name for name in node.names("node") if name in self._dependent]
        return node.name in self._dependent and bool(operands) and not is_linear(node, operands)

    def _new_block(self, size: int) -> int:
        self._sizes.append(size)
        return len(self._sizes) - 1

    def _entries(self, name: str) -> int:
        return math.prod(self._shapes[name])

    def _size_of(self, names: Iterable[str]) -> int:
        return sum(map(self._entries, names))

    def _widths(self, blocks: Sequence[int]) -> dict[int, int]:
        return {block: self._sizes[block] for block in blocks}

    def _alive(self, position: int) -> list[str]:
        """What is known behind a node and read later."""
        names = (node.name for node in self._nodes[: position + 1])
        return [n for n in names if n in self._dependent and self._last.get(n, -1) > position]

    def _evaluate(self, start: int, end: int) -> None:
        """Expressions of linear nodes, and of what does not depend on the inputs."""
        for node in self._nodes[start:end]:
            self._room.hold(self._matrices())
            if node.name not in self._dependent:
                self._found[node.name] = {}
            elif node.op != "input":
                operands = {n: (self._found[n], self._shapes[n]) for n in node.names("node")}
                self._found[node.name] = self._linear.expression(node, operands, self._sizes)

    def _matrices(self) -> Iterator[Tensor]:
        """All that is held."""
        parts = [own for expression in self._found.values() for own in expression.values()]
        for step in self._done:
            parts += [step.read, step.added, *([] if step.kept is None else [step.kept])]
        return (t for own in parts for t in (own.value, own.error) if t is not None)

    def _forget(self, position: int) -> None:
        """What is not read behind a node takes no memory."""
        for name in list(self._found):
            if self._last.get(name, -1) <= position:
                self._found[name] = {}

    # Steps

    def _activation(self, node: Node) -> _Pending | None:
        """Begin a step; None where the node turns out to be linear."""
        step = self._steps[node.name]
        operands = list(dict.fromkeys(n for n in node.names("node") if n in self._dependent))
        if len(operands) == 1 and self._entries(operands[0]) == self._entries(node.name):
            slopes = self._slopes.get(entry_key(node)) or self._asked.slopes(step)
            if slopes is not None:
                return self._pointwise(step, operands[0], slopes)
        return self._vectors(node, step, operands)

    def _pointwise(
        self, step: Step, operand: str, slopes: tuple[Tensor, Tensor]
    ) -> _Pending | None:
        """Units of one slope are linear; the others are a new block."""
        node, read = step.node, self._found[operand]
        lower, upper = slopes
        free = lower < upper
        places = free.nonzero()[:, 0]
        units = Units(step, operand, slopes, places)
        if bool(free.all()):
            pending = self._begin(node.name, of_slopes(lower, upper), read, units)
            self._found[node.name] = {pending.block: Coefficients()}
            return pending
        known = scaled_rows(read, torch.where(free, 0.0, lower), self._sizes)
        self._found[node.name] = known
        if not bool(free.any()):
            return None
        own = selected_rows(read, places, self._sizes, self._linear.like)
        pending = self._begin(node.name, of_slopes(lower[free], upper[free]), own, units)
        eye = torch.eye(len(free), dtype=lower.dtype, device=lower.device)
        self._found[node.name] = {**known, pending.block: Coefficients(eye[:, places].contiguous())}
        return pending

    def _vectors(self, node: Node, step: Step, operands: Sequence[str]) -> _Pending | None:
        """One block for each operand that the node depends on; all but the last are finished."""
        known = zip(step.operation.operands, self._asked.constants_of(step), strict=True)
        constants = {name: constant for name, constant in known if name in operands and constant}
        blocks, pending = {}, None
        for position, (operand, constant) in enumerate(constants.items()):
            if pending is not None:
                self._keep(pending, (*pending.base, pending.block))
            sizes = self._entries(operand), self._entries(node.name)
            constraint = of_vectors(constant, *sizes, self._linear.like)
            name = node.name if len(constants) == 1 else f"{node.name}[{position}]"
            pending = self._begin(name, constraint, self._found[operand])
            blocks[pending.block] = Coefficients()
        self._found[node.name] = blocks
        return pending

    def _begin(
        self, name: str, constraint: Constraint, read: Expression, units: Units | None = None
    ) -> _Pending:
        self._room.hold(self._matrices())
        before = sum(self._sizes[block] for block in self._base)
        # What is alive behind it is not known yet: at least what it reads has to be factored.
        self._room.require_step(
            name, StepSizes(before, constraint.inputs, constraint.outputs, 1), last=True
        )
        parts = [(read, constraint.inputs)]
        matrix = joined_rows(parts, self._widths(self._base), self._linear.like)
        block = self._new_block(constraint.outputs)
        return _Pending(name, constraint, matrix, self._base, block, units)

    def _finish(self, pending: _Pending, alive: Sequence[str]) -> None:
        """Carry on the tensors that are alive, or the blocks that they consist of."""
        blocks = {block for name in alive for block in self._found[name]}
        if not blocks:
            return
        if self._size_of(alive) >= sum(self._sizes[block] for block in blocks):
            self._keep(pending, [b for b in (*pending.base, pending.block) if b in blocks])
            return
        parts = [(self._found[name], self._entries(name)) for name in alive]
        new = [self._new_block(self._entries(name)) for name in alive]
        self._add(pending, parts, new)
        self._found.update({n: {b: Coefficients()} for n, b in zip(alive, new, strict=True)})

    def _keep(self, pending: _Pending, blocks: Sequence[int]) -> None:
        self._add(pending, [({b: Coefficients()}, self._sizes[b]) for b in blocks], blocks)

    def _add(
        self,
        pending: _Pending,
        parts: Sequence[tuple[Expression, int]],
        blocks: Sequence[int],
    ) -> None:
        like, base = self._linear.like, self._widths(pending.base)
        own = {pending.block: self._sizes[pending.block]}
        old = any(block in base for expression, _ in parts for block in expression)
        constraint = pending.constraint
        sizes = StepSizes(
            sum(base.values()),
            constraint.inputs,
            constraint.outputs,
            sum(self._sizes[block] for block in blocks),
            moved=pending.read.value is not None,
            kept=old,
            added=len(blocks) > 1 or blocks[0] != pending.block,
        )
        self._room.hold(self._matrices())
        self._room.require_step(pending.name, sizes)
        self._done.append(
            GraphStep(
                pending.name,
                pending.constraint,
                pending.read,
                joined_rows(parts, base, like) if old else None,
                joined_rows(parts, own, like),
                tuple(base.values()),
                tuple(self._sizes[block] for block in blocks),
                pending.units,
            )
        )
        self._base = tuple(blocks)


def _without_extrema(graph: Graph) -> Graph:
    """``max(x, y) = y + relu(x - y)`` and ``min(x, y) = x - relu(x - y)``, which share a ReLU."""
    nodes: list[Node] = []
    for node in graph.nodes:
        own = node.op in ("aten.maximum", "aten.minimum") and written_here(rule_of(node.op))
        if not own or not all(written_here(rule_of(f"aten.{op}")) for op in ("sub", "add", "relu")):
            nodes.append(node)
            continue
        first, second = node.args[:2]
        names = f"{node.name} difference", f"{node.name} positive part"
        difference, part = (Reference("node", name) for name in names)
        args = (second, part) if node.op == "aten.maximum" else (first, part)
        op = "aten.add" if node.op == "aten.maximum" else "aten.sub"
        nodes += [
            replace(node, name=names[0], op="aten.sub", args=(first, second)),
            replace(node, name=names[1], op="aten.relu", args=(difference,)),
            replace(node, op=op, args=args),
        ]
    return Graph(tuple(nodes), graph.outputs)


def dependent_nodes(graph: Graph) -> Collection[str]:
    """Names of the nodes that depend on the inputs."""
    found: set[str] = set()
    for node in graph.nodes:
        same = node.op == "lipfast.repeated"  # for all samples
        if node.op == "input" or (not same and any(n in found for n in node.names("node"))):
            found.add(node.name)
    return found


def _last_readers(graph: Graph) -> dict[str, int]:
    """Where a node is read last; an output behind all nodes."""
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.names("node"), position))
    return {**last, **dict.fromkeys(graph.outputs, len(graph.nodes))}

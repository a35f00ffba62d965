"""Recognise pointwise ops that are together a function of one variable.

``h * sigmoid(h)`` is bounded as a function of h, not as a product. Bounds only: what is evaluated
stays as it was traced.
"""

from __future__ import annotations

from collections.abc import Mapping

from lipfast.graph.nodes import Graph, Node, Reference
from lipfast.plan.repeated import join_repeated
from lipfast.rules.compositions import composition
from lipfast.rules.formulas import FORMULAS, Formula, lowered
from lipfast.rules.products import divides
from lipfast.rules.registry import rule_of, written_here

# Their own rules know no bound without those of their operand.
_NEED_MORE = frozenset(
    f"aten.{name}"
    for name in ("exp", "expm1", "log", "log1p", "pow", "reciprocal", "rsqrt", "sqrt", "square")
)

# These have one on every bounded part of the line.
_STEEP = ("aten.exp", "aten.expm1", "aten.square")

# Refused by their own rules, as a part of a composition they may be bounded.
_REFUSED_ALONE = frozenset(
    f"aten.{name}" for name in ("div", "log", "log1p", "reciprocal", "rsqrt", "sqrt")
)


def join_compositions(graph: Graph) -> Graph:
    """The graph in which a node that is a function of one earlier node says so.

    Such nodes become ``lipfast.composition`` where several results meet (a sum, a product, a
    quotient, a maximum), or where an op has a bound on a part of the line only. The earlier node is
    the first one that the result is a pointwise function of.
    """
    sources = _sources(graph)
    nodes = tuple(_joined(node, graph, sources) for node in graph.nodes)
    return graph if nodes == graph.nodes else graph.rewritten(nodes)


def by_their_rules(graph: Graph) -> list[Node]:
    """The nodes of a graph that their own rules must cover: but for parts of compositions, all."""
    alone = {node.name: node.op for node in join_compositions(join_repeated(graph)).nodes}
    return [
        node
        for node in graph.nodes
        if node.op not in _REFUSED_ALONE or alone.get(node.name) == node.op
    ]


def _sources(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For every node those that it is a pointwise function of, itself last."""
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        operands = [graph.node(name) for name in dict.fromkeys(node.names("node"))]
        common: tuple[str, ...] = ()
        known = node.op in FORMULAS and written_here(rule_of(node.op))
        if operands and known and all(operand.shape == node.shape for operand in operands):
            first, *others = (found[operand.name] for operand in operands)
            common = tuple(name for name in first if all(name in other for other in others))
        found[node.name] = (*common, node.name)
    return found


def _joined(node: Node, graph: Graph, sources: Mapping[str, tuple[str, ...]]) -> Node:
    source = sources[node.name][0]
    operands = node.names("node")
    meets = len(operands) > 1 or node.op in _NEED_MORE or divides(node)
    alone = set(operands) == {source} and node.op not in _STEEP
    if source == node.name or not meets or alone:
        return node
    formula = Formula()
    position = _put(node, source, graph, formula, {source: 0})
    if position is None:
        return node
    return composition(Reference("node", source), node, formula.finished(position))


def _put(
    node: Node, source: str, graph: Graph, formula: Formula, known: dict[str, int]
) -> int | None:
    """Put a node and what it reads, down to the source, into a formula."""
    open_ = [node]
    while open_:
        current = open_[-1]
        missing = [name for name in current.names("node") if name not in known]
        if missing:
            open_ += [graph.node(name) for name in missing]
            continue
        open_.pop()
        position = lowered(formula, current, lambda reference: known[reference.name])
        if position is None:
            return None
        known[current.name] = position
    return known[node.name]

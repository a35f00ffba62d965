"""Recognise residual layers of one hidden layer, ``x + A s(B x + c)``: bounds take them as one."""

from __future__ import annotations

from lipfast.graph.nodes import Argument, Graph, Node, Reference
from lipfast.rules.registry import rule_of, written_here
from lipfast.rules.residual import has_slopes_below_one, residual_layer

_LAYOUTS = ("matrix", "transposed matrix")


def join_residuals(graph: Graph) -> Graph:
    """The graph in which such sums are ``lipfast.residual``, which knows the matrices A and B."""
    nodes = tuple(_residual(node, graph) for node in graph.nodes)
    return graph if nodes == graph.nodes else Graph(nodes, graph.outputs)


def _residual(node: Node, graph: Graph) -> Node:
    alpha = node.argument(2, "alpha", 1)
    known = node.op in ("aten.add", "aten.sub") and written_here(rule_of(node.op))
    if not known or alpha != 1 or len(node.names("node")) != 2:
        return node
    sign = 1.0 if node.op == "aten.add" else -1.0
    for position in (0, 1):
        start = graph.defining(node.args[1 - position])
        if start is not None and start.shape == node.shape:
            # y - x is -(x - y): only the relative sign matters.
            layer = _hidden_layer(start, node.args[position], graph, sign)
            if layer is not None:
                return residual_layer(node, (position, *layer))
    return node


def _hidden_layer(
    node: Node, x: Argument, graph: Graph, sign: float
) -> tuple[Argument, ...] | None:
    """B, scalings before and after A, and A: see `residual_layer`."""
    after, outer = _scalings(node, graph)
    second = _weight(outer)
    if outer is None or second is None:
        return None
    before, activation = _scalings(graph.defining(outer.args[0]), graph)
    if activation is None or not has_slopes_below_one(activation):
        return None
    first = _without_shift(graph.defining(activation.args[0]), graph)
    weight = _weight(first)
    if first is None or weight is None or first.args[0] != x:
        return None
    return weight, before, (*after, sign), second


def _weight(node: Node | None) -> tuple[Argument, ...] | None:
    """The matrix of a linear layer, and whether it is stored as (in, out)."""
    if node is None or rule_of(node.op).affine not in _LAYOUTS:
        return None
    own = written_here(rule_of(node.op)) and len(node.args) > 1
    weight = node.args[1] if own else None
    fits = isinstance(weight, Reference) and weight.kind in ("parameter", "constant")
    return (weight, rule_of(node.op).affine == "transposed matrix") if fits else None


def _scalings(node: Node | None, graph: Graph) -> tuple[tuple[Argument, ...], Node | None]:
    """What an activation is multiplied by, and the activation."""
    factors: list[Argument] = []
    while node is not None and node.op in ("aten.mul", "aten.neg"):
        active = [value for value in node.args if graph.defining(value) is not None]
        inner = graph.defining(active[0]) if len(active) == 1 else None
        if inner is None or inner.shape != node.shape:
            return (), None
        factors += [value for value in node.args if value != active[0]]
        factors += [-1.0] if node.op == "aten.neg" else []
        node = inner
    return tuple(factors), node


def _without_shift(node: Node | None, graph: Graph) -> Node | None:
    """The activation that a bias was added to."""
    while node is not None and node.op == "aten.add" and node.argument(2, "alpha", 1) == 1:
        active = [value for value in node.args[:2] if graph.defining(value) is not None]
        inner = graph.defining(active[0]) if len(active) == 1 else None
        if inner is None or inner.shape != node.shape:
            return None
        node = inner
    return node

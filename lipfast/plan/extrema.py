"""Maxima that are written with absolute values: ``(a + b + |a - b|) / 2``."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import TypeAlias

from lipfast.graph.nodes import Argument, Graph, Node
from lipfast.rules.registry import rule_of, written_here

# A sum of multiples of nodes, by name.
_Sum: TypeAlias = dict[str, Fraction]
_DEEPEST = 12
_COMBINATIONS = ("aten.add", "aten.sub", "aten.rsub", "aten.mul", "aten.div")


def join_extrema(graph: Graph) -> Graph:
    """The graph in which they are `aten.maximum` and `aten.minimum`."""
    size = "aten.abs"
    if not written_here(rule_of(size)) or all(node.op != size for node in graph.nodes):
        return graph
    nodes = tuple(_without_size(node, graph) for node in graph.nodes)
    return graph if nodes == graph.nodes else Graph(nodes, graph.outputs)


def _without_size(node: Node, graph: Graph) -> Node:
    if node.op not in _COMBINATIONS or not written_here(rule_of(node.op)):
        return node
    total = _sum_of(node, graph)
    sizes = [graph.node(name) for name in total or () if graph.node(name).op == "aten.abs"]
    difference = graph.defining(sizes[0].args[0]) if len(sizes) == 1 else None
    if total is None or difference is None or difference.op != "aten.sub":
        return node
    operands = [graph.defining(value) for value in difference.args]
    half = total.pop(sizes[0].name)
    if abs(half) != Fraction(1, 2) or len(operands) != 2 or difference.kwargs:
        return node
    mean: _Sum | None = {}
    for operand in operands:
        mean = _plus(mean, _term(operand, graph, _DEEPEST), Fraction(1, 2))
        if operand is None or operand.shape != node.shape:
            return node
    if mean is None or _nonzero(mean) != _nonzero(total):
        return node
    op = "aten.maximum" if half > 0 else "aten.minimum"
    return replace(node, op=op, args=difference.args, kwargs=())


def _sum_of(node: Node, graph: Graph, depth: int = _DEEPEST) -> _Sum | None:
    """What a node adds up; None where it does more."""
    first, second = (*node.args, None, None)[:2]
    left, right = graph.defining(first), graph.defining(second)
    if node.op in ("aten.mul", "aten.div"):
        value, other = (first, right) if left is None else (second, left)
        factor = _exact(value)
        if factor is None or (node.op == "aten.div" and (left is None or factor == 0)):
            return None
        scale = factor if node.op == "aten.mul" else 1 / factor
        plain = len(node.args) == 2 and not node.kwargs
        return _plus({}, _term(other, graph, depth), scale) if plain else None
    alpha = _exact(node.argument(2, "alpha", 1))
    if alpha is None:
        return None
    factors = {
        "aten.add": (Fraction(1), alpha),
        "aten.sub": (Fraction(1), -alpha),
        "aten.rsub": (-alpha, Fraction(1)),
    }[node.op]
    total: _Sum | None = {}
    for operand, scale in zip((left, right), factors, strict=True):
        total = _plus(total, _term(operand, graph, depth), scale)
    return total


def _term(node: Node | None, graph: Graph, depth: int) -> _Sum | None:
    """An operand as a sum: of what it adds up, or itself."""
    if node is None:
        return None
    inner = _sum_of(node, graph, depth - 1) if node.op in _COMBINATIONS and depth else None
    return {node.name: Fraction(1)} if inner is None else inner


def _plus(total: _Sum | None, term: _Sum | None, factor: Fraction) -> _Sum | None:
    if total is None or term is None:
        return None
    found = dict(total)
    for name, count in term.items():
        found[name] = found.get(name, Fraction(0)) + count * factor
    return found


def _nonzero(total: _Sum) -> _Sum:
    return {name: count for name, count in total.items() if count}


def _exact(value: Argument) -> Fraction | None:
    """A number that is no other by rounding; None for anything else."""
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return Fraction(value) if finite and isinstance(value, (int, float)) else None

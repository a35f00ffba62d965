"""Take apart what depends on the inputs and what parameters alone decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lipfast.errors import TraceError
from lipfast.graph.nodes import Argument, Graph, Node, Reference, computed_name, needed
from lipfast.plan.computed import refusal, rounded
from lipfast.rules.registry import rule_of


def split_computed(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Graph, tuple[Node, ...]]:
    """Move nodes that depend on parameters and constants only out of the graph.

    Args:
        graph: simplified, as traced.
        shapes: of nodes that do not depend on the input.

    Returns:
        The graph, which refers to the others as computed parameters, and those, in order.

    Raises:
        TraceError: an output does not depend on the input.
    """
    moved, kept = _taken_apart(graph, shapes)
    names = {node.name for node in moved}
    if names & set(graph.outputs):
        raise TraceError("an output of the model does not depend on its input")
    replaced: dict[str, Argument] = {
        name: Reference("parameter", computed_name(name)) for name in names
    }
    inexact = rounded(moved)
    kept, inverses = _without_quotients(kept, {n.name: n for n in moved if n.name in inexact})
    moved += inverses
    replaced |= {node.name: Reference("parameter", computed_name(node.name)) for node in inverses}
    nodes = [node.substituted(replaced) for node in kept]
    used = {name for node in nodes for name in node.names("parameter")}
    computed = needed(moved, (node.name for node in moved if computed_name(node.name) in used))
    return Graph(tuple(nodes), graph.outputs), computed


def _without_quotients(
    kept: list[Node], inexact: Mapping[str, Node]
) -> tuple[list[Node], list[Node]]:
    """``x / c`` with a rounded c as ``x (1 / c)``, and the nodes that compute ``1 / c``.

    A product is linear in its factors, so the rules account for their rounding errors.
    """
    nodes: list[Node] = []
    inverses: dict[str, Node] = {}
    for node in kept:
        divisor = node.args[1] if node.op == "aten.div" and len(node.args) == 2 else None
        source = inexact.get(divisor.name) if isinstance(divisor, Reference) else None
        if source is None or node.kwargs:
            nodes.append(node)
            continue
        name = f"{source.name}_inverse"
        inverses[name] = replace(
            source, name=name, op="aten.reciprocal", args=(divisor,), kwargs=()
        )
        product = (node.args[0], Reference("node", name))
        nodes.append(replace(node, op="aten.mul", args=product))
    return nodes, list(inverses.values())


def _taken_apart(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Node], list[Node]]:
    """Nodes of parameters only, and the others."""
    moved: list[Node] = []
    kept: list[Node] = []
    dependent: set[str] = set()
    for node in graph.nodes:
        if node.op == "input" or not dependent.isdisjoint(node.names("node")):
            kept.append(node)
            dependent.add(node.name)
        else:
            moved.append(replace(node, shape=shapes.get(node.name, node.shape)))
    return moved, kept


def without_bound(graph: Graph, computed: tuple[Node, ...]) -> list[tuple[str, str]]:
    """Ops (and their modules) on parameters that cannot be evaluated with a bound of their error.

    Also the ops of the graph whose rules do not account for that of a computed parameter.
    """
    missing = [
        (f"{node.op} ({_control_flow(node) or why})", node.module)
        for node in computed
        if (why := refusal(node)) is not None
    ]
    inexact = {computed_name(name) for name in rounded(computed)}
    return missing + [
        (f"{node.op} (of a tensor that is computed from parameters and rounded)", node.module)
        for node in graph.nodes
        if any(ref.name in inexact for ref in node.references())
        and rule_of(node.op).parameter_errors is None
    ]


def _control_flow(node: Node) -> str:
    return "control flow" if node.op.startswith("get_attr.") else ""

"""One node for what a graph computes twice: only then two results are known to be the same."""

from __future__ import annotations

from lipfast.graph.nodes import Argument, Graph, Reference
from lipfast.rules.registry import rule_of


def join_repeated(graph: Graph) -> Graph:
    """The graph in which equal ops on equal operands are one node.

    Layers stay apart: their table has a row for each. So do normalisations that fold into them.
    """
    known: dict[object, str] = {}
    replaced: dict[str, Argument] = {}
    nodes = []
    for node in graph.nodes:
        current = node.substituted(replaced) if replaced else node
        rule = rule_of(node.op)
        layer = node.op == "input" or rule.layer is not None or rule.affine is not None
        key = (current.op, current.args, current.kwargs, current.shape)
        if not layer and node.name not in graph.outputs and key in known:
            replaced[node.name] = Reference("node", known[key])
            continue
        known.setdefault(key, node.name)
        nodes.append(current)
    return Graph(tuple(nodes), graph.outputs) if replaced else graph

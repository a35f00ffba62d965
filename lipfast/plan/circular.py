"""Join circular padding and the convolution that reads it: one operator, of one norm.

The product of the two norms counts what is read twice, as if every entry were: up to twice the norm
in two dimensions. The operator that wraps around is a circulant (or some rows of one), and
`conv_norms` bounds it as such.
"""

from __future__ import annotations

from dataclasses import replace

from lipfast.graph.nodes import Graph, Node, Reference
from lipfast.plan.fold import FoldedGraph
from lipfast.rules.convolution import settings
from lipfast.rules.registry import rule_of, written_here

_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")


def join_circular_padding(folded: FoldedGraph) -> FoldedGraph:
    """The graph in which convolutions pad circularly by themselves.

    Torch's op has no such padding: the graph is for bounds, and cannot be evaluated.
    """
    graph = folded.graph
    nodes = tuple(_padding_itself(node, graph) for node in graph.nodes)
    return folded if nodes == graph.nodes else replace(folded, graph=graph.rewritten(nodes))


def _padding_itself(node: Node, graph: Graph) -> Node:
    pad = graph.defining(node.args[0]) if node.op in _CONVOLUTIONS else None
    if pad is None or pad.op != "aten.pad" or pad.argument(2, "mode") != "circular":
        return node
    if not all(written_here(rule_of(part.op)) for part in (node, pad)):
        return node
    source, before = pad.operand(0, "self"), graph.defining(pad.argument(0, "self"))
    sides, axes = pad.argument(1, "pad"), len(node.shape) - 1
    found = settings(node)
    plain = isinstance(found.padding, tuple) and not any(found.padding)
    if source is None or before is None or len(before.shape) != axes + 1 or not plain:
        return node
    if not isinstance(sides, tuple) or len(sides) > 2 * axes:
        return node
    numbers = [side for side in sides if isinstance(side, int)]
    if len(numbers) != len(sides) or any(side < 0 for side in numbers):
        return node
    # Torch names the last axis first.
    numbers += [0] * (2 * axes - len(numbers))
    pairs = tuple((numbers[2 * a], numbers[2 * a + 1]) for a in reversed(range(axes)))
    weight: tuple[Reference | None, ...] = (node.reference(1), node.operand(2, "bias"))
    args = (source, *weight, found.stride, pairs, found.dilation, found.groups)
    return replace(node, args=args, kwargs=(("padding_mode", "circular"),))

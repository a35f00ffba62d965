"""Merge affine maps that follow one another: ``||W_2 W_1|| <= ||W_2|| ||W_1||``.

A linear layer after a linear layer is one with the weight W_2 W_1. Convolutions merge where the
second sees everything that the first puts out, and nothing else: its padding is 0, or the first is
1 x 1 and does not pad (then zeros around its output are what zeros around its input give, but for
the bias: differences of outputs stay as they are, values do not).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lipfast.graph.nodes import Argument, Graph, Node, Reference, computed_name
from lipfast.rules.convolution import settings
from lipfast.rules.registry import rule_of

# A merged weight may take this many entries; larger ones stay apart.
LARGEST = 1 << 24

_MATRICES = ("matrix", "transposed matrix")
Shapes = Mapping[str, tuple[int, ...]]
# Where a computed node finds one of its operands.
Lookup = Callable[[Argument], "Reference | None"]


@dataclass(frozen=True)
class Merged:
    """A graph with fewer affine maps.

    Attributes:
        graph: refers to merged weights as computed parameters.
        nodes: how those are computed, in order.
        origins: name of the affine node -> weights that it is made of, the innermost first.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    origins: Mapping[str, tuple[str, ...]]


def merge_affine(graph: Graph, shapes: Shapes, *, values: bool) -> Merged:
    """Merge every affine map with the one before it, where nothing else reads that one.

    Args:
        graph: any graph.
        shapes: of the parameters.
        values: the function must stay the same; otherwise only its differences must, which are
            what a Lipschitz constant sees.

    Returns:
        The graph, and how its new weights are computed.
    """
    found = Merged(graph, (), {})
    known = dict(shapes)
    while True:
        pair = _next_pair(found, known, values)
        if pair is None:
            return found
        found = _with_merged(found, *pair, known)


def _next_pair(found: Merged, shapes: Shapes, values: bool) -> tuple[Node, Node] | None:
    readers = found.graph.readers
    for second in found.graph.nodes:
        first = found.graph.defining(second.argument(0, "input"))
        if first is None or len(readers[first.name]) != 1 or first.name in found.graph.outputs:
            continue
        if _fit(first, second, shapes, values):
            return first, second
    return None


def _fit(first: Node, second: Node, shapes: Shapes, values: bool) -> bool:
    """Whether two affine maps are one."""
    weights = first.operand(1, "weight"), second.operand(1, "weight")
    if any(weight is None or weight.kind != "parameter" for weight in weights):
        return False
    kinds = rule_of(first.op).affine, rule_of(second.op).affine
    if kinds[0] in _MATRICES and kinds[1] in _MATRICES:
        return math.prod(_joint_counts(first, second, shapes)) <= LARGEST
    if kinds[0] != "convolution" or first.op != second.op:
        return False
    inner, outer = _Kernel.of(first, shapes), _Kernel.of(second, shapes)
    if inner is None or outer is None:
        return False
    plain = all(size == 1 for size in inner.sizes) and not any(inner.padding)
    # Zeros around the first output stand for zeros around the input, not for its bias.
    kept = plain and (not values or first.argument(2, "bias") is None)
    if any(outer.padding) and not kept:
        return False
    counts = _joint_counts(first, second, shapes)
    return math.prod((*outer.after(inner).sizes, *counts)) <= LARGEST


def _counts(node: Node, shapes: Shapes) -> tuple[int, int]:
    """Numbers of outputs and of inputs (channels of a convolution)."""
    first, second = shapes[node.reference(1).name][:2]
    return (second, first) if _is_transposed(node) else (first, second)


def _joint_counts(first: Node, second: Node, shapes: Shapes) -> tuple[int, int]:
    return _counts(second, shapes)[0], _counts(first, shapes)[1]


def _is_transposed(node: Node) -> bool:
    return rule_of(node.op).affine == "transposed matrix"


@dataclass(frozen=True)
class _Kernel:
    """A convolution without groups: sizes, stride, padding and dilation per axis."""

    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(node: Node, shapes: Shapes) -> _Kernel | None:
        found = settings(node)
        if found.padding == "same" or found.groups != 1:
            return None
        sizes = shapes[node.reference(1).name][2:]
        return _Kernel(sizes, found.stride, found.padding, found.dilation)

    def steps(self, inner: _Kernel) -> tuple[list[int], list[int], list[int]]:
        """Per axis: the joint dilation, and in units of it the taps' distances of both kernels."""
        joint, near, far = [], [], []
        for axis in range(len(self.sizes)):
            first = inner.dilation[axis] if inner.sizes[axis] > 1 else 0
            second = inner.stride[axis] * self.dilation[axis] if self.sizes[axis] > 1 else 0
            common = math.gcd(first, second) or 1
            joint.append(common)
            near.append(first // common)
            far.append(second // common)
        return joint, near, far

    def after(self, inner: _Kernel) -> _Kernel:
        """The convolution that both are together."""
        joint, near, far = self.steps(inner)
        axes = range(len(self.sizes))
        return _Kernel(
            tuple((inner.sizes[a] - 1) * near[a] + (self.sizes[a] - 1) * far[a] + 1 for a in axes),
            tuple(inner.stride[a] * self.stride[a] for a in axes),
            tuple(inner.padding[a] + inner.stride[a] * self.padding[a] for a in axes),
            tuple(joint),
        )


def _with_merged(
    found: Merged, first: Node, second: Node, shapes: dict[str, tuple[int, ...]]
) -> Merged:
    """One affine node in the place of `second`."""
    known = {computed_name(node.name) for node in found.nodes}

    def reference(argument: Argument) -> Reference | None:
        if isinstance(argument, Reference) and argument.name in known:
            return Reference("node", argument.name.partition(":")[2])
        return argument if isinstance(argument, Reference) else None

    origins = (*_origins(found, first), *_origins(found, second))
    name = f"merged {second.name} " + " ".join(origins)
    build = _merged_matrices if rule_of(second.op).affine in _MATRICES else _merged_kernels
    nodes, merged = build(first, second, name, reference, shapes)
    for node in nodes:
        shapes[computed_name(node.name)] = node.shape
    rest = [
        merged if node.name == second.name else node
        for node in found.graph.nodes
        if node.name != first.name
    ]
    others = {key: value for key, value in found.origins.items() if key != first.name}
    return Merged(
        Graph(tuple(rest), found.graph.outputs),
        (*found.nodes, *nodes),
        {**others, second.name: origins},
    )


def _origins(found: Merged, node: Node) -> tuple[str, ...]:
    return found.origins.get(node.name, (node.reference(1).name,))


def _merged_matrices(
    first: Node, second: Node, name: str, reference: Lookup, shapes: Shapes
) -> tuple[list[Node], Node]:
    """``W_2 (W_1 x + b_1) + b_2``."""
    nodes: list[Node] = []
    sides = []
    for index, node in enumerate((second, first)):
        side, shape = reference(node.args[1]), _counts(node, shapes)
        if _is_transposed(node):
            nodes.append(Node(f"{name} transposed {index}", "aten.mT", (side,), (), shape))
            side = Reference("node", nodes[-1].name)
        sides.append(side)
    shape = _joint_counts(first, second, shapes)
    nodes.append(Node(f"{name} weight", "aten.matmul", tuple(sides), (), shape))
    weight = Reference("parameter", computed_name(nodes[-1].name))
    bias = _bias((first, second), name, reference, nodes, sides[0])
    args = (first.args[0], weight) + (() if bias is None else (bias,))
    return nodes, Node(second.name, "aten.linear", args, (), second.shape, second.module)


def _bias(
    pair: tuple[Node, Node], name: str, reference: Lookup, nodes: list[Node], weight: Argument
) -> Argument:
    """``W_2 b_1 + b_2``; appends the nodes that compute it."""
    inner, own = reference(pair[0].argument(2, "bias")), pair[1].argument(2, "bias")
    rows = nodes[0].shape[0] if len(nodes[0].shape) > 2 else nodes[-1].shape[0]
    if inner is None:
        return own
    nodes.append(Node(f"{name} moved bias", "aten.matmul", (weight, inner), (), (rows,)))
    if own is not None:
        moved = Reference("node", nodes[-1].name)
        nodes.append(Node(f"{name} bias", "aten.add", (moved, reference(own)), (), (rows,)))
    return Reference("parameter", computed_name(nodes[-1].name))


def _merged_kernels(
    first: Node, second: Node, name: str, reference: Lookup, shapes: Shapes
) -> tuple[list[Node], Node]:
    """The kernel of both convolutions, and the bias that the first one's becomes."""
    inner, outer = _Kernel.of(first, shapes), _Kernel.of(second, shapes)
    assert inner is not None
    assert outer is not None
    joint = outer.after(inner)
    _, near, far = outer.steps(inner)
    rows, columns = _joint_counts(first, second, shapes)
    kernels = (reference(second.args[1]), reference(first.args[1]))
    shape = (rows, columns, *joint.sizes)
    steps = (tuple(near), tuple(far))
    nodes = [Node(f"{name} weight", "lipfast.composed_kernels", (*kernels, *steps), (), shape)]
    weight = Reference("parameter", computed_name(nodes[0].name))
    bias: Argument = second.argument(2, "bias")
    if first.argument(2, "bias") is not None:
        axes = tuple(range(2, 2 + len(joint.sizes)))
        sums = Node(f"{name} sums", "aten.sum", (kernels[0], axes), (), (rows, first.shape[0]))
        nodes.append(sums)
        bias = _bias((first, second), name, reference, nodes, Reference("node", sums.name))
    args = (first.args[0], weight, bias, joint.stride, joint.padding, joint.dilation, 1)
    return nodes, Node(second.name, second.op, args, (), second.shape, second.module)


def merged_layers(origins: Sequence[str]) -> str:
    """How the layer table names a merged layer: its modules, the first to act first."""
    names = [origin.rpartition(".")[0] or origin for origin in origins]
    return " + ".join(names)

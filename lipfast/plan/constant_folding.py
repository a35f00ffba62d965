"""Folding of what depends on constants, parameters and the number of samples only.

A mask ``torch.full((B, 1), 3.0)``, a class token ``cls.expand(B, -1, -1)`` and what is calculated
from them are the same for every sample. They are computed for one, beside the other computed
parameters. That is sound where no op mixes or tells apart the samples: then the tensor for B
samples is that for one, B times over. `_APART` lists the ops that do neither, and checks where each
leaves the samples. Anything else (``arange(B)``, a sum over the samples) is not folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import Node as FxNode

from lipfast.graph.nodes import Argument, Graph, Node, Reference
from lipfast.plan.canonical import CASTS, IDENTITIES

REPEATED = "lipfast.repeated"
ATTENTION = "aten.scaled_dot_product_attention"
_BATCH = Reference("batch")


def _aten(*names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names)


# Of another tensor they take the shape only: what they are with that shape.
_LIKE = {
    "aten.full_like": "aten.full",
    "aten.ones_like": "aten.ones",
    "aten.zeros_like": "aten.zeros",
    "aten.expand_as": "aten.expand",
    "aten.view_as": "aten.reshape",
}
# One tensor, copied to sizes at position 1.
_COPIED = _aten("expand", "broadcast_to", "repeat")
# Entry by entry, operands broadcast from the right.
_POINTWISE = (
    _aten(
        *("abs", "add", "ceil", "clamp", "clamp_max", "clamp_min", "cos", "div", "exp"),
        *("expm1", "fill", "floor", "floor_divide", "log", "masked_fill", "maximum", "minimum"),
        *("mul", "neg", "pow", "reciprocal", "relu", "remainder", "rsqrt", "rsub", "sigmoid"),
        *("sign", "sin", "softplus", "sqrt", "square", "sub", "tanh", "where"),
        *("eq", "ge", "gt", "le", "lt", "ne", "bitwise_and", "bitwise_not", "bitwise_or"),
        *("bitwise_xor", "logical_and", "logical_not", "logical_or", "logical_xor"),
        "lift_fresh_copy",
    )
    | CASTS
    | IDENTITIES
)
# Along dimensions of the first operand, at position 1; they stay, or vanish.
_ALONG = _aten(
    *("all", "amax", "amin", "any", "cumsum", "flip", "index_select", "linalg_vector_norm"),
    *("log_softmax", "logsumexp", "mean", "narrow", "roll", "select", "slice", "softmax", "sum"),
)
_DIMENSIONS_AT = {"aten.linalg_vector_norm": 2, "aten.roll": 2}  # where it is not 1
_RESHAPES = _aten(
    *("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze")
)
# The number of samples may be among their sizes.
_SIZED = _COPIED | _RESHAPES | _aten("slice", "full", "ones", "zeros", "empty")
# They read what is the same for all samples as a parameter with a dimension of one for the samples.
_BROADCASTING = _aten(
    *("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "masked_fill"),
    *("matmul", "bmm", "mm", "baddbmm", "addmm"),
)


@dataclass
class Folding:
    """What is known of the nodes so far.

    Attributes:
        position: dimension of the samples, and how many entries each has there; (-1, 1) for none.
        axes: nodes that are the same for all samples -> dimension of the samples; -1 where one
            sample was picked.
        active: nodes that depend on the input, or are not known to be the same for all samples.
    """

    position: Callable[[Any], tuple[int, int]]
    axes: dict[str, int] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)

    def without_reading(self, call: Node, node: FxNode) -> Node:
        """Ops that read only the shape or the dtype of a tensor, with that in its place."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return call
        dtype = Reference("dtype", str(value.dtype).removeprefix("torch."))
        if call.op == "aten.type_as" and self.active.isdisjoint(
            replace(call, args=call.args[:1]).names("node")
        ):
            return replace(call, op="aten.to", args=(call.args[0], dtype))
        op = _LIKE.get(call.op)
        sizes = self._sizes(value)
        if op is None or not all(isinstance(size, (int, Reference)) for size in sizes):
            return call
        if call.op in ("aten.expand_as", "aten.view_as"):
            return replace(call, op=op, args=(call.args[0], sizes), kwargs=())
        kwargs = tuple(sorted({**dict(call.kwargs), "dtype": dtype}.items()))
        return replace(call, op=op, args=(sizes, *call.args[1:]), kwargs=kwargs)

    def _sizes(self, value: Tensor) -> tuple[Any, ...]:
        position, multiple = self.position(value)
        batch = _BATCH if multiple == 1 else Reference("batch", str(multiple))
        return tuple(batch if axis == position else size for axis, size in enumerate(value.shape))

    def folded(self, call: Node, node: FxNode) -> Node | None:
        """The call for one sample, if its result is the same for all; None if it is not.

        Notes what the result depends on.
        """
        reads = call.names("node")
        if not self.active.isdisjoint(reads):
            self.active.add(call.name)
            return None
        same = any(self.axes.get(name, -1) >= 0 for name in reads)
        if not same and not call.names("batch"):
            return None
        axis, multiple = self.position(node.meta.get("val"))
        if multiple == 1 and self._keeps_apart(call, node, axis):
            self.axes[call.name] = axis
            return _for_one_sample(call)
        if same:
            self.active.add(call.name)
        return None

    def _keeps_apart(self, call: Node, node: FxNode, axis: int) -> bool:
        """Whether the samples neither meet nor are told apart, and `axis` is where they end up."""
        check, result = _APART.get(call.op), node.meta.get("val")
        if check is None or not isinstance(result, Tensor):
            return False
        seen = _Seen(call, tuple(self._operands(node)), result, axis)
        sized = not call.names("batch") or call.op in _SIZED
        picked = axis < 0 and call.op == "aten.select"
        return sized and (axis >= 0 or picked) and seen.one_varies and check(seen)

    def _operands(self, node: FxNode) -> Iterator[tuple[Tensor, int]]:
        """Tensors among the arguments, and where their samples are (-1: nowhere)."""
        for entry in node.all_input_nodes:
            value = entry.meta.get("val")
            if isinstance(value, Tensor):
                yield value, self.position(value)[0]
            elif isinstance(value, (list, tuple)):  # `node` takes one of several results
                yield from self._operands(entry)


@dataclass(frozen=True)
class _Seen:
    """An op on what is the same for all samples.

    Attributes:
        call: the op, with dimensions counted from the front where its rule names them.
        operands: tensors among its arguments, and where their samples are (-1: nowhere).
        result: with symbolic sizes.
        axis: where the samples of the result are.
    """

    call: Node
    operands: Sequence[tuple[Tensor, int]]
    result: Tensor
    axis: int

    @property
    def one_varies(self) -> bool:
        """Whether at most one dimension of each tensor depends on the number of samples."""
        tensors = [self.result, *(tensor for tensor, _ in self.operands)]
        return all(sum(not isinstance(n, int) for n in t.shape) <= 1 for t in tensors)

    @property
    def first(self) -> tuple[Tensor, int]:
        return self.operands[0]

    def dims(self, rank: int) -> list[int]:
        """The dimensions that the op names, counted from the front."""
        position = _DIMENSIONS_AT.get(self.call.op, 1)
        by_name = dict(self.call.kwargs)
        name = "dims" if "dims" in by_name else "dim"
        return [dim % max(1, rank) for dim in self.call.dimensions(position, name)]


def _of_sizes(seen: _Seen) -> bool:
    """Of sizes, in front of which the number of samples stands, and of numbers."""
    sizes = seen.call.args[0]
    at = sizes.index(_BATCH) if isinstance(sizes, tuple) and _BATCH in sizes else -1
    return at == seen.axis and len(seen.call.names("batch")) == 1


def _broadcast(seen: _Seen) -> bool:
    """Every operand has its samples at `axis` of the result, or a dimension of one, or none."""
    for value, place in seen.operands:
        shifted = seen.axis - seen.result.dim() + value.dim()
        if place != shifted and (place >= 0 or (shifted >= 0 and value.shape[shifted] != 1)):
            return False
    return len(seen.call.names("batch")) <= 1


def _matrices_in_front(seen: _Seen) -> bool:
    """The samples are in front of the last two dimensions, which alone are told apart."""
    plain = all(value.dim() >= 2 for value, _ in seen.operands)
    return plain and seen.axis < seen.result.dim() - 2 and _broadcast(seen)


def _rows(seen: _Seen) -> bool:
    """A linear layer with fixed weights, of rows of the same samples."""
    (x, place), *others = seen.operands
    return 0 <= place < x.dim() - 1 and place == seen.axis and all(p < 0 for _, p in others)


def _reshaped(seen: _Seen) -> bool:
    """Each sample keeps its entries: as many stand before the samples as did."""
    value, place = seen.first
    if place < 0 or (
        seen.call.op == "aten.squeeze" and place in (seen.dims(value.dim()) or [place])
    ):
        return False  # of one sample, squeezing would take the dimension of the samples
    return math.prod(value.shape[:place]) == math.prod(seen.result.shape[: seen.axis])


def _moved_about(seen: _Seen) -> bool:
    """A permutation of dimensions: the only one that varies holds the samples."""
    return seen.first[1] >= 0


def _is_joined(seen: _Seen) -> bool:
    stacked = seen.call.op == "aten.stack"
    dim = seen.call.argument(1, "dim", 0)
    assert isinstance(dim, int)
    dim %= seen.result.dim()
    places = {place + (stacked and dim <= place) for _, place in seen.operands if place >= 0}
    alike = all(place >= 0 for _, place in seen.operands)
    return alike and places == {seen.axis} and dim != seen.axis


def _along(seen: _Seen) -> bool:
    """The op names other dimensions than that of the samples."""
    (value, place), *others = seen.operands
    dims = seen.dims(value.dim())
    if place < 0 or not dims or any(p >= 0 for _, p in others):
        return False
    if seen.call.op == "aten.select" and seen.axis < 0:
        # The samples are all alike: the first one is any of them.
        return dims == [place] and seen.call.argument(2, "index") in (0, -1)
    whole = place in dims and seen.call.op == "aten.slice" and _is_whole(seen.call)
    vanish = sum(dim < place for dim in dims) if seen.result.dim() < value.dim() else 0
    apart = place not in dims and not seen.call.names("batch")
    return (apart or whole) and seen.axis == place - vanish


def _is_whole(call: Node) -> bool:
    end = call.argument(3, "end")
    whole = end in (None, _BATCH) or (isinstance(end, int) and end >= 2**62)
    return call.argument(2, "start") in (None, 0) and whole and call.argument(4, "step", 1) == 1


def _padded_behind(seen: _Seen) -> bool:
    """Only dimensions behind that of the samples grow."""
    pads, place = seen.call.argument(1, "pad"), seen.first[1]
    return isinstance(pads, tuple) and 0 <= place == seen.axis < seen.result.dim() - len(pads) // 2


def _looked_up(seen: _Seen) -> bool:
    """Rows of a table at indices: either the table or the indices have samples."""
    if len(seen.operands) != 2:
        return False
    (_, of_table), (_, of_indices) = seen.operands
    if seen.call.op == "aten.embedding":
        return of_table < 0 and of_indices == seen.axis
    indices = seen.call.argument(1, "indices")
    assert isinstance(indices, tuple)
    at = next(index for index, entry in enumerate(indices) if entry is not None)
    if of_indices < 0:
        return of_table == seen.axis < at
    return of_table < 0 and at + of_indices == seen.axis


_APART: dict[str, Callable[[_Seen], bool]] = {
    **dict.fromkeys(_aten("full", "ones", "zeros", "empty"), _of_sizes),
    **dict.fromkeys(_COPIED | _POINTWISE, _broadcast),
    **dict.fromkeys(_aten("matmul", "bmm", "tril", "triu", "mT"), _matrices_in_front),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(_aten("permute", "transpose", "t"), _moved_about),
    **dict.fromkeys(_aten("cat", "stack"), _is_joined),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_aten("pad", "constant_pad_nd"), _padded_behind),
    **dict.fromkeys(_aten("embedding", "index"), _looked_up),
    "aten.linear": _rows,
}


def _for_one_sample(call: Node) -> Node:
    def one(value: Argument) -> Argument:
        if isinstance(value, tuple):
            return tuple(one(entry) for entry in value)
        return 1 if value == _BATCH else value

    kwargs = tuple((key, one(value)) for key, value in call.kwargs)
    return replace(call, args=tuple(one(value) for value in call.args), kwargs=kwargs)


def with_repetitions(
    graph: Graph, axes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> Graph:
    """The graph, in which activations meet what is the same for all samples.

    Sums, products and their kin read it for one sample; for anything else (a join with a class
    token) it is repeated by ``lipfast.repeated``, which depends on the number of samples.

    Args:
        graph: simplified.
        axes: of the nodes that are the same for all samples, see `Folding`.
        shapes: of those nodes, for one sample.
    """
    nodes = {node.name for node in graph.nodes}
    known = {name for name in axes if name in nodes}
    if not known or not graph.inputs:
        return graph
    repeated = known & set(graph.outputs)
    for node in graph.nodes:
        if node.name not in known:
            repeated |= known.intersection(_needs_all_samples(node, axes))
    repeated = {name for name in repeated if axes[name] >= 0}
    direct = {n.name for n in graph.nodes if n.name in known or _reads_one_sample(n, axes)}
    return Graph(tuple(_repeated(graph, direct, repeated, shapes)), graph.outputs)


def _reads_one_sample(node: Node, axes: Mapping[str, int]) -> bool:
    return node.op in _BROADCASTING or (node.op == "aten.einsum" and _meet(node, axes))


def _meet(node: Node, axes: Mapping[str, int]) -> bool:
    """Whether the letter of the samples is that of the result's, which none is summed over."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, tuple)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    places = [axes.get(v.name, -1) if isinstance(v, Reference) else -1 for v in operands]
    parts = zip(inputs.split(","), places, strict=True)
    same = all(place < 0 or part[place] == output[:1] for part, place in parts)
    return bool(arrow) and "." not in equation and same


def _needs_all_samples(node: Node, axes: Mapping[str, int]) -> list[str]:
    """What a node on activations does not read for one sample alone."""
    if node.op == ATTENTION:
        return replace(node, args=node.args[:3], kwargs=()).names("node")
    return [] if _reads_one_sample(node, axes) else node.names("node")


def _repeated(
    graph: Graph, direct: set[str], repeated: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Node]:
    """The nodes; those in `direct` read what is `repeated` for one sample."""
    once: dict[str, Argument] = {name: Reference("node", f"{name}_once") for name in repeated}
    source = Reference("node", graph.inputs[0].name)
    for node in graph.nodes:
        changed = node
        if node.name in direct:
            changed = node.substituted(once)
        elif node.op == ATTENTION:
            mask = node.substituted(once)
            changed = replace(mask, args=(*node.args[:3], *mask.args[3:]))
        if node.name not in repeated:
            yield changed
            continue
        shape, name = shapes[node.name], f"{node.name}_once"
        yield replace(changed, name=name, shape=shape)
        yield Node(
            node.name, REPEATED, (source, Reference("node", name)), (), shape[1:], node.module
        )

"""Products with tensors that do not depend on the input, written as layers.

``x @ W``, ``W @ x``, `einsum`, `tensordot`, `inner`, `mv`, `addmm`, `baddbmm` and `bilinear` are
sums of products. With one weight they are a linear layer between moves of entries, whose norm is
known exactly; with a weight for each of several indices, or of two activations, a product of
matrices. Every rewriting is exact in real arithmetic. Nodes on weights become computed parameters.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lipfast.errors import naming
from lipfast.graph.nodes import Argument, Graph, Node, Reference
from lipfast.rules.registry import RULES, rule_of

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Operand:
    """A tensor of a product.

    Attributes:
        reference: to it.
        shape: of it; of an activation for one sample.
        active: whether it depends on the input, and has the samples in front.
    """

    reference: Reference
    shape: _Shape
    active: bool


@dataclass
class _Rewriting:
    """The nodes so far, and what is known of their results."""

    static: dict[Reference, _Shape]
    active: dict[str, _Shape] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    source: Node = field(default_factory=lambda: Node("", ""))

    def keep(self, node: Node) -> None:
        """Append a node that stays as it is."""
        self.nodes.append(node)
        depends = node.op == "input" or any(name in self.active for name in node.names("node"))
        if depends:
            self.active[node.name] = node.shape

    def operand(self, argument: Argument) -> _Operand | None:
        """What is known of an argument; None where that is not enough."""
        if not isinstance(argument, Reference):
            return None
        if argument.kind == "node" and argument.name in self.active:
            return _Operand(argument, self.active[argument.name], True)
        shape = self.static.get(argument)
        return None if shape is None else _Operand(argument, shape, False)

    def add(self, op: str, args: tuple[Argument, ...], shape: _Shape, *, active: bool) -> _Operand:
        """Append a node in front of the one that is rewritten."""
        name = f"{self.source.name}.{len(self.nodes)}"  # export's names have no dots
        node = Node(name, op, args, (), shape, self.source.module)
        self.nodes.append(node)
        reference = Reference("node", name)
        (self.active if active else self.static)[name if active else reference] = shape  # type: ignore[index]
        return _Operand(reference, shape, active)

    def reshaped(self, x: _Operand, shape: _Shape) -> _Operand:
        if x.shape == shape:
            return x
        sizes: tuple[Argument, ...] = (Reference("batch"), *shape) if x.active else shape
        return self.add("aten.reshape", (x.reference, sizes), shape, active=x.active)

    def permuted(self, x: _Operand, order: Sequence[int]) -> _Operand:
        """The dimensions in another order, those of one sample counted from 0."""
        if list(order) == list(range(len(x.shape))):
            return x
        shape = tuple(x.shape[axis] for axis in order)
        dims = (0, *(axis + 1 for axis in order)) if x.active else tuple(order)
        return self.add("aten.permute", (x.reference, dims), shape, active=x.active)

    def weight(self, w: _Operand) -> Reference:
        """A weight as layers take it: constants become computed parameters."""
        if w.reference.kind != "constant":
            return w.reference
        return self.add("aten.clone", (w.reference,), w.shape, active=False).reference


Rewrite = Callable[[Node, _Rewriting], "_Operand | None"]


def with_layers(graph: Graph, shapes: Mapping[Reference, _Shape]) -> Graph:
    """Write products with weights as layers where that is possible; the function stays the same.

    Args:
        graph: simplified; nodes that are the same for all samples are not repeated.
        shapes: of parameters, constants, and nodes that do not depend on the input.
    """
    state = _Rewriting(dict(shapes))
    for node in graph.nodes:
        state.source = node
        rewrite = None if _has_a_rule_of_its_own(node.op) else _REWRITES.get(node.op)
        with naming(node.op, node.module):
            active = any(name in state.active for name in node.names("node"))
            found = rewrite(node, state) if rewrite is not None and active else None
        if found is None:
            state.keep(_with_weights(node, state))
            continue
        last = state.nodes.pop()
        assert last.name == found.reference.name
        state.active.pop(last.name)
        state.keep(replace(last, name=node.name, shape=node.shape))
    return graph.rewritten(state.nodes)


def _has_a_rule_of_its_own(op: str) -> bool:
    """Whether a rule was written for an op that is rewritten otherwise: then that one counts."""
    return op in RULES and op not in ("aten.matmul", "aten.bmm", "aten.linear")


def _with_weights(node: Node, state: _Rewriting) -> Node:
    """A layer whose weight or bias is a constant: it becomes a computed parameter."""
    if rule_of(node.op).layer is None:
        return node

    def lifted(argument: Argument) -> Argument:
        operand = state.operand(argument)
        constant = operand is not None and operand.reference.kind == "constant"
        return state.weight(operand) if operand is not None and constant else argument

    kwargs = tuple((key, lifted(value)) for key, value in node.kwargs)
    return replace(node, args=tuple(lifted(value) for value in node.args), kwargs=kwargs)


def _product_of_two(node: Node, state: _Rewriting) -> _Operand | None:
    return _product(*node.args, node=node, state=state) if len(node.args) == 2 else None


def _product(left: Argument, right: Argument, *, node: Node, state: _Rewriting) -> _Operand | None:
    """``A B`` of matrices (vectors), as `torch.matmul` has it."""
    first, second = state.operand(left), state.operand(right)
    if first is None or second is None:
        return None
    if first.active and second.active:
        return _of_two_activations(first, second, node, state)
    weight, x = (second, first) if first.active else (first, second)
    shape = weight.shape
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) not in (1, 2):
        args = (first.reference, second.reference)
        return state.add("aten.matmul", args, node.shape, active=True)
    if len(x.shape) < (1 if first.active else 2):
        return None  # over the samples
    if len(shape) == 1:
        shape = (*shape, 1) if first.active else (1, *shape)
    matrix = state.reshaped(weight, shape)
    if first.active:
        result = _times(x, matrix, "lipfast.matmul", shape[1], state)
    else:
        turned = _last_two_swapped(x, state)
        result = _last_two_swapped(_times(turned, matrix, "aten.linear", shape[0], state), state)
    return state.reshaped(result, node.shape)


def _of_two_activations(
    first: _Operand, second: _Operand, node: Node, state: _Rewriting
) -> _Operand | None:
    """`bmm` and `matmul` are known as they are; other ops are written as one."""
    if node.op in ("aten.matmul", "aten.bmm") or min(len(first.shape), len(second.shape)) < 2:
        return None
    args = (first.reference, second.reference)
    return state.add("aten.matmul", args, node.shape, active=True)


def _times(x: _Operand, matrix: _Operand, op: str, outputs: int, state: _Rewriting) -> _Operand:
    args = (x.reference, state.weight(matrix))
    return state.add(op, args, (*x.shape[:-1], outputs), active=True)


def _last_two_swapped(x: _Operand, state: _Rewriting) -> _Operand:
    rank = len(x.shape)
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    return state.add("aten.transpose", (x.reference, rank - 1, rank), shape, active=True)


def _vector_layer(node: Node, state: _Rewriting) -> _Operand | None:
    """With a vector as weight, a linear layer has one output, which is no dimension."""
    weight = state.operand(node.argument(1, "weight"))
    if weight is None or len(weight.shape) != 1 or weight.active:
        return None
    result = _product(node.args[0], weight.reference, node=node, state=state)
    bias = node.argument(2, "bias")
    return result if result is None or bias is None else _with_addend(result, bias, 1, state)


def _with_addend(x: _Operand, other: Argument, factor: Argument, state: _Rewriting) -> _Operand:
    args: tuple[Argument, ...] = (x.reference, other)
    return state.add("aten.add", args if factor == 1 else (*args, factor), x.shape, active=True)


def _added_product(node: Node, state: _Rewriting) -> _Operand | None:
    """``beta C + alpha A B``."""
    result = _product(*node.args[1:3], node=node, state=state)
    if result is None:
        return None
    alpha, beta = node.argument(4, "alpha", 1), node.argument(3, "beta", 1)
    last, bias = state.nodes[-1], state.operand(node.args[0])
    if last.op == "lipfast.matmul" and alpha == beta == 1 and _is_bias(bias, node):
        assert bias is not None
        state.nodes.pop()
        args = (*last.args, state.weight(bias))
        return state.add(last.op, args, node.shape, active=True)
    if alpha != 1:
        result = state.add("aten.mul", (result.reference, alpha), result.shape, active=True)
    return result if beta == 0 else _with_addend(result, node.args[0], beta, state)


def _is_bias(bias: _Operand | None, node: Node) -> bool:
    return bias is not None and not bias.active and bias.shape == node.shape[-1:]


def _einsum(node: Node, state: _Rewriting) -> _Operand | None:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, tuple) or len(operands) != 2:
        return None
    found = [operand for value in operands if (operand := state.operand(value)) is not None]
    if len(found) != 2:
        return None
    sides = _labels(equation.replace(" ", ""), [len(x.shape) + x.active for x in found])
    return None if sides is None else _contracted(found, sides[:2], sides[2], state)


def _labels(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """One letter for every dimension of the operands and of the result; None where they repeat."""
    inputs, arrow, output = equation.partition("->")
    parts = inputs.split(",")
    if len(parts) != len(ranks):
        return None
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    widths = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    widest = max(width if "..." in part else 0 for part, width in zip(parts, widths, strict=True))
    hidden = "".join(spare[:widest])
    parts = [
        part.replace("...", hidden[widest - width :] if "..." in part else "")
        for part, width in zip(parts, widths, strict=True)
    ]
    if not arrow:
        letters = sorted(inputs.replace(",", "").replace("...", ""))
        output = "..." + "".join(x for x in letters if letters.count(x) == 1)
    sides = [*parts, output.replace("...", hidden)]
    fits = all(len(part) == rank for part, rank in zip(parts, ranks, strict=True))
    return sides if fits and all(len(set(side)) == len(side) for side in sides) else None


def _tensordot(node: Node, state: _Rewriting) -> _Operand | None:
    found = [operand for v in node.args[:2] if (operand := state.operand(v)) is not None]
    if len(found) != 2:
        return None
    ranks = [len(x.shape) + x.active for x in found]
    sides = [list(string.ascii_letters[: ranks[0]]), list(string.ascii_letters[26:][: ranks[1]])]
    dims = (node.dimensions(2, "dims_self"), node.dimensions(3, "dims_other"))
    for one, other in zip(*dims, strict=True):
        sides[1][other] = sides[0][one]
    joint = set(sides[0]) & set(sides[1])
    output = [letter for side in sides for letter in side if letter not in joint]
    return _contracted(found, ["".join(side) for side in sides], "".join(output), state)


def _inner_product(node: Node, state: _Rewriting) -> _Operand | None:
    """Over the last dimensions of both."""
    found = [operand for v in node.args[:2] if (operand := state.operand(v)) is not None]
    ranks = [len(x.shape) + x.active for x in found]
    if len(found) != 2 or 0 in ranks:
        return None
    first, second = string.ascii_lowercase[: ranks[0] - 1], string.ascii_uppercase[: ranks[1] - 1]
    return _contracted(found, [f"{first}z", f"{second}z"], first + second, state)


def _bilinear(node: Node, state: _Rewriting) -> _Operand | None:
    """``x^T W_k y + b_k``: a linear layer and a product of activations."""
    found = [operand for v in node.args[:3] if (operand := state.operand(v)) is not None]
    if len(found) != 3 or found[2].active or not (found[0].active and found[1].active):
        return None
    x, y, weight = found
    more = string.ascii_uppercase[: len(x.shape)]
    turned = _contracted([x, weight], [f"{more}i", "kij"], f"{more}kj", state)
    sides = [f"{more}kj", f"{more}j"]
    result = None if turned is None else _contracted([turned, y], sides, f"{more}k", state)
    bias = node.argument(3, "bias")
    return result if result is None or bias is None else _with_addend(result, bias, 1, state)


def _contracted(
    operands: Sequence[_Operand], sides: Sequence[str], output: str, state: _Rewriting
) -> _Operand | None:
    """The sum of products over all letters that are not in `output`.

    Activations have the samples in front, and so has the result.
    """
    if not operands[0].active:  # one that is active first
        operands, sides = operands[::-1], sides[::-1]
    sample = sides[0][:1]
    second = operands[1]
    if sides[1][:1] == sample and not second.active and second.shape[:1] == (1,):
        # The same for all samples: without the dimension that stands for them.
        alone = state.reshaped(second, second.shape[1:])
        operands, sides = (operands[0], alone), (sides[0], sides[1][1:])
    if not operands[0].active or output[:1] != sample or _mixes(operands[1], sides[1], sample):
        return None
    letters = [side.replace(sample, "") for side in sides]
    result = output.replace(sample, "")
    sizes: dict[str, int] = {}
    for operand, side in zip(operands, letters, strict=True):
        for letter, size in zip(side, operand.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return None  # a dimension of one that is copied
    x, y = (
        _summed(operand, side, letters[1 - index] + result, state)
        for index, (operand, side) in enumerate(zip(operands, letters, strict=True))
    )
    shared = [a for a in x[1] if a in y[1]]
    joint = "".join(a for a in shared if a in result)
    inner = "".join(a for a in shared if a not in result)
    mine, other = ("".join(a for a in side if a not in shared) for side in (x[1], y[1]))
    left = state.permuted(x[0], [x[1].index(a) for a in joint + mine + inner])
    right = _behind(y, (joint, inner, other), state)
    counts = (len(joint), len(inner))
    build = _batched_product
    if not inner:
        build = _elementwise
    elif not operands[1].active and not joint:
        build = _one_layer
    order = joint + mine + other
    found = state.reshaped(build(left, right, counts, state), tuple(sizes[a] for a in order))
    return state.permuted(found, [order.index(a) for a in result])


def _mixes(operand: _Operand, side: str, sample: str) -> bool:
    """Whether samples of one operand would meet more than those of the same place in the other."""
    return side[:1] != sample if operand.active else sample in side


_Side = tuple[_Operand, str]


def _summed(operand: _Operand, side: str, kept: str, state: _Rewriting) -> _Side:
    """The operand, summed over what nothing else has."""
    axes = tuple(index for index, letter in enumerate(side) if letter not in kept)
    if not axes:
        return operand, side
    rest = [index for index in range(len(side)) if index not in axes]
    shape = tuple(operand.shape[index] for index in rest)
    dims = tuple(axis + operand.active for axis in axes)
    args = (operand.reference, dims, False)
    return state.add("aten.sum", args, shape, active=operand.active), "".join(side[i] for i in rest)


def _behind(y: _Side, groups: tuple[str, str, str], state: _Rewriting) -> _Operand:
    """The second operand with its letters in this order, attention's ``K^T`` as a transpose."""
    joint, inner, other = groups
    turned = y[0].active and len(inner) == len(other) == 1
    order = joint + (other + inner if turned else inner + other)
    found = state.permuted(y[0], [y[1].index(letter) for letter in order])
    return _last_two_swapped(found, state) if turned else found


def _elementwise(x: _Operand, y: _Operand, counts: tuple[int, int], state: _Rewriting) -> _Operand:
    """Products of x (joint, mine) and y (joint, other): (joint, mine, other)."""
    joint = counts[0]
    other, mine = len(y.shape) - joint, len(x.shape) - joint
    left = state.reshaped(x, (*x.shape, *[1] * other))
    right = state.reshaped(y, (*y.shape[:joint], *[1] * mine, *y.shape[joint:]))
    args = (left.reference, right.reference)
    return state.add("aten.mul", args, (*x.shape, *y.shape[joint:]), active=True)


def _one_layer(x: _Operand, y: _Operand, counts: tuple[int, int], state: _Rewriting) -> _Operand:
    """A linear layer, of x (mine, inner) and the weight y (inner, other)."""
    inner = counts[1]
    terms, outputs = math.prod(y.shape[:inner]), math.prod(y.shape[inner:])
    flat = state.reshaped(x, (*x.shape[: len(x.shape) - inner], terms))
    matrix = state.reshaped(y, (terms, outputs))
    return _times(flat, matrix, "lipfast.matmul", outputs, state)


def _batched_product(
    x: _Operand, y: _Operand, counts: tuple[int, int], state: _Rewriting
) -> _Operand:
    """Products of the matrices x (joint, mine, inner) and y (joint, inner, other)."""
    joint, inner = counts
    end = len(x.shape) - inner
    batch = x.shape[:joint]
    rows, terms = math.prod(x.shape[joint:end]), math.prod(x.shape[end:])
    columns = math.prod(y.shape[joint + inner :])
    left = state.reshaped(x, (*batch, rows, terms))
    right = state.reshaped(y, (*batch, terms, columns))
    args = (left.reference, right.reference)
    return state.add("aten.matmul", args, (*batch, rows, columns), active=True)


_REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(("aten.matmul", "aten.mm", "aten.bmm", "aten.mv"), _product_of_two),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmv"), _added_product),
    "aten.linear": _vector_layer,
    "aten.einsum": _einsum,
    "aten.tensordot": _tensordot,
    "aten.inner": _inner_product,
    "aten.bilinear": _bilinear,
}

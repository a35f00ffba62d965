"""Drop what does not change the function, and join what export takes apart.

Every rewriting here is exact in real arithmetic; nothing touches weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lipfast.errors import naming
from lipfast.graph.nodes import Argument, Graph, Node, Reference
from lipfast.plan.canonical import CASTS, IDENTITIES, TRANSPOSES
from lipfast.rules.registry import rule_of

_PRODUCTS = frozenset({"aten.matmul", "aten.mm"})
# NaN apart, of which no bound says anything, these are the same.
_EXTREMA = {
    "aten.max": "aten.maximum",
    "aten.fmax": "aten.maximum",
    "aten.min": "aten.minimum",
    "aten.fmin": "aten.minimum",
}
_ROOTS = {0.5: "aten.sqrt", -0.5: "aten.rsqrt", -1: "aten.reciprocal"}
# Whether a comparison holds for the larger operand in front.
_COMPARISONS = {"aten.gt": True, "aten.ge": True, "aten.lt": False, "aten.le": False}


def simplify(graph: Graph, floating: Mapping[str, bool], ranks: Mapping[str, int]) -> Graph:
    """Return the same function with fewer nodes.

    Args:
        graph: as traced.
        floating: for each node, whether its result is a floating tensor; for parameters and
            constants alike, under ``kind:name``.
        ranks: number of dimensions of each parameter.

    Returns:
        The graph without identities and unused nodes, with softsign, maxima of two tensors and
        products with a (transposed) parameter recognised.
    """
    graph = _join_choices(_drop_identities(graph, floating))
    graph = _each(graph, lambda node: _as_slice(node, graph))
    graph = _without_roots_as_powers(graph)
    graph = _select_before_permuting(graph)
    graph = _join_softsign(graph)
    graph = join_products(graph, ranks)
    return graph.rewritten(graph.nodes)


def _select_before_permuting(graph: Graph) -> Graph:
    """``x.permute(2, 0, ...)[i]`` becomes ``x.select(2, i).permute(0, ...)``.

    That is how attention takes queries, keys and values apart; between the two the samples are
    not in front.
    """
    nodes = tuple(found for node in graph.nodes for found in _selected_first(node, graph))
    return Graph(nodes, graph.outputs)


def _selected_first(node: Node, graph: Graph) -> tuple[Node, ...]:
    moved = graph.defining(node.args[0]) if node.op == "aten.select" else None
    if moved is None or moved.op != "aten.permute" or node.dimensions(1, "dim") != (0,):
        return (node,)
    order, source = moved.dimensions(1, "dims"), graph.defining(moved.args[0])
    if source is None or order[0] == 0 or order[1] != 0:
        return (node,)
    axis = order[0]
    shape = source.shape[: axis - 1] + source.shape[axis:]
    args = (moved.args[0], axis, *node.args[2:])
    picked = replace(node, name=f"{node.name}_picked", args=args, shape=shape)
    rest = tuple(dim - (dim > axis) for dim in order[1:])
    turned = (Reference("node", picked.name), rest)
    return picked, replace(moved, name=node.name, args=turned, shape=node.shape)


def _drop_identities(graph: Graph, floating: Mapping[str, bool]) -> Graph:
    replaced: dict[str, Reference] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        current = node.substituted(replaced)
        source = current.args[0] if current.args else None
        cast = node.op in CASTS and floating.get(node.name, False) and _floating(source, floating)
        # An output must stay a node: do not replace it by a parameter.
        if (
            (node.op in IDENTITIES or cast)
            and isinstance(source, Reference)
            and (source.kind == "node" or node.name not in graph.outputs)
        ):
            replaced[node.name] = source
        else:
            nodes.append(current)
    outputs = (replaced[name].name if name in replaced else name for name in graph.outputs)
    return Graph(tuple(nodes), tuple(outputs))


def _floating(source: Argument, floating: Mapping[str, bool]) -> bool:
    """Whether an operand holds floating numbers; integers become such by a cast that stays."""
    if not isinstance(source, Reference):
        return True
    name = source.name if source.kind == "node" else f"{source.kind}:{source.name}"
    return floating.get(name, True)


def _join_choices(graph: Graph) -> Graph:
    """``torch.max(a, b)`` and ``where(a > b, a, b)`` become `aten.maximum`, and their like."""
    graph = _each(graph, _as_extremum)
    graph = _each(graph, lambda node: _as_choice(node, graph))
    return _each(graph, lambda node: _as_mask(node, graph))


def _as_slice(node: Node, graph: Graph) -> Node:
    """``narrow(x, dim, start, length)`` is a slice."""
    source = graph.defining(node.args[0]) if node.op == "aten.narrow" else None
    if source is None or len(node.args) != 4:
        return node
    dim, start, length = node.args[1:]
    if not (isinstance(dim, int) and isinstance(start, int) and isinstance(length, int)):
        return node
    # Counted from the end it stays so, also where the graph is used for another width.
    end = start + length if start + length or start >= 0 else 2**63 - 1
    return replace(
        node, op="aten.slice", args=(node.args[0], dim % (len(source.shape) + 1), start, end)
    )


def _without_roots_as_powers(graph: Graph) -> Graph:
    """``x ** 0.5`` of an activation and its like as roots and reciprocals, which have rules."""
    active = {node.name for node in graph.inputs}
    nodes = []
    for node in graph.nodes:
        if not active.isdisjoint(node.names("node")):
            active.add(node.name)
            nodes.append(_as_root(node))
        else:
            nodes.append(node)
    return Graph(tuple(nodes), graph.outputs)


def _as_root(node: Node) -> Node:
    exponent = node.argument(1, "exponent") if node.op == "aten.pow" else None
    if not isinstance(exponent, (int, float)) or exponent not in _ROOTS:
        return node
    return replace(node, op=_ROOTS[exponent], args=node.args[:1], kwargs=())


def _as_extremum(node: Node) -> Node:
    two = len(node.args) == 2 and all(isinstance(value, Reference) for value in node.args)
    if node.op not in _EXTREMA or not two or node.kwargs:
        return node
    return replace(node, op=_EXTREMA[node.op])


def _compared(argument: Argument, graph: Graph) -> tuple[Argument, Argument] | None:
    """Operands of a comparison, so ordered that it holds where the first is the larger."""
    node = graph.defining(argument)
    if node is None or node.op not in _COMPARISONS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    return (first, second) if _COMPARISONS[node.op] else (second, first)


def _as_choice(node: Node, graph: Graph) -> Node:
    """``where(a > b, a, b)`` is a maximum; see `_two_slopes` for ``where(x > 0, x, c x)``."""
    if node.op != "aten.where" or len(node.args) != 3 or node.kwargs:
        return node
    pair = _compared(node.args[0], graph)
    if pair is None:
        return node
    chosen, other = node.args[1:]
    if {chosen, other} == {*pair}:
        return _extremum_of(node, chosen, other, largest=pair == (chosen, other))
    if pair[1] == 0 and chosen == pair[0]:
        return _two_slopes(node, chosen, graph.defining(other))
    if pair[0] == 0 and other == pair[1]:
        return _two_slopes(node, other, graph.defining(chosen))
    return node


def _two_slopes(node: Node, x: Argument, scaled: Node | None) -> Node:
    """What is x where x > 0, and -x or c x for a number c elsewhere: abs, or a LeakyReLU."""
    if scaled is not None and scaled.op == "aten.neg" and scaled.args == (x,):
        return replace(node, op="aten.abs", args=(x,))
    if scaled is None or scaled.op != "aten.mul" or len(scaled.args) != 2:
        return node
    numbers = [value for value in scaled.args if isinstance(value, (int, float))]
    if len(numbers) != 1 or x not in scaled.args:
        return node
    return replace(node, op="aten.leaky_relu", args=(x, float(numbers[0])))


def _extremum_of(node: Node, first: Argument, second: Argument, *, largest: bool) -> Node:
    """The maximum (minimum) of two operands, one of which may be a number."""
    numbers = [value for value in (first, second) if not isinstance(value, Reference)]
    if not numbers:
        return replace(node, op="aten.maximum" if largest else "aten.minimum", args=(first, second))
    tensor = second if first is numbers[0] else first
    op = "aten.clamp_min" if largest else "aten.clamp_max"
    return replace(node, op=op, args=(tensor, *numbers))


def _as_mask(node: Node, graph: Graph) -> Node:
    """``x * (x > 0)`` is a ReLU, ``x * (x < 0)`` the smaller of x and 0."""
    if node.op != "aten.mul" or len(node.args) != 2 or node.kwargs:
        return node
    for x, mask in (node.args, node.args[::-1]):
        holder = graph.defining(mask)
        cast = holder is not None and holder.op in CASTS
        pair = _compared(holder.args[0] if holder is not None and cast else mask, graph)
        if pair is not None and isinstance(x, Reference) and {x, 0} == {*pair}:
            op = "aten.clamp_min" if pair[0] == x else "aten.clamp_max"
            return replace(node, op=op, args=(x, 0.0))
    return node


def _join_softsign(graph: Graph) -> Graph:
    """``x / (1 + |x|)`` is how softsign is exported; as a quotient it would have no rule."""

    def joined(node: Node) -> Node:
        if node.op == "aten.div" and len(node.args) == 2 and not node.kwargs:
            denominator = graph.defining(node.args[1])
            if denominator is not None and _is_one_plus_abs(denominator, node.args[0], graph):
                return replace(node, op="lipfast.softsign", args=node.args[:1])
        return node

    return _each(graph, joined)


def _is_one_plus_abs(node: Node, x: Argument, graph: Graph) -> bool:
    if node.op != "aten.add" or node.kwargs or len(node.args) != 2:
        return False
    operand, one = node.args if not isinstance(node.args[0], (int, float)) else node.args[::-1]
    magnitude = graph.defining(operand)
    is_one = isinstance(one, (int, float)) and float(one) == 1.0
    return (
        is_one and magnitude is not None and magnitude.op == "aten.abs" and magnitude.args == (x,)
    )


def _transposed_parameter(
    argument: Argument, graph: Graph, ranks: Mapping[str, int]
) -> Reference | None:
    """Find the matrix parameter whose transpose `argument` is."""
    node = graph.defining(argument)
    if node is None:
        return None
    swap = (node.op == "aten.transpose" and {*node.args[1:]} in ({0, 1}, {-1, -2})) or (
        node.op == "aten.permute" and node.args[1:] == ((1, 0),)
    )
    source = node.args[0] if node.args else None
    if not (node.op in TRANSPOSES or swap) or not isinstance(source, Reference):
        return None
    is_matrix = source.kind == "parameter" and ranks.get(source.name) == 2
    return source if is_matrix else None


def _each(graph: Graph, rewrite: Callable[[Node], Node]) -> Graph:
    """The graph with every node rewritten; what fails names its node."""
    nodes = []
    for node in graph.nodes:
        with naming(node.op, node.module):
            nodes.append(rewrite(node))
    return Graph(tuple(nodes), graph.outputs)


def join_products(graph: Graph, ranks: Mapping[str, int]) -> Graph:
    """Recognise products with a parameter as linear layers."""
    return _each(graph, lambda node: _as_linear(node, graph, ranks))


def _as_linear(node: Node, graph: Graph, ranks: Mapping[str, int]) -> Node:
    """``x @ W.T (+ b)`` becomes `aten.linear`, ``x @ W (+ b)`` becomes `lipfast.matmul`."""
    bias: tuple[Argument, ...] = ()
    operands = node.args
    if node.op == "aten.addmm" and not node.kwargs:
        bias, operands = node.args[:1], node.args[1:]
        vector = isinstance(bias[0], Reference) and ranks.get(bias[0].name) == 1
        if not vector:
            return node
    elif node.op not in _PRODUCTS:
        return node
    if len(operands) != 2:
        return node
    x, weight = operands
    transposed = _transposed_parameter(weight, graph, ranks)
    if transposed is not None:
        return replace(node, op="aten.linear", args=(x, transposed, *bias), kwargs=())
    direct = isinstance(weight, Reference) and weight.kind == "parameter"
    if isinstance(weight, Reference) and direct and ranks.get(weight.name) == 2:
        return replace(node, op="lipfast.matmul", args=(x, weight, *bias), kwargs=())
    return node


def join_attention(graph: Graph) -> Graph:
    """``softmax(c Q K^T + constants) V`` becomes `lipfast.weighted_rows` of S, V, Q, K and c.

    S and V are what it is evaluated from; from Q and K a tighter constant follows.
    """
    return _each(graph, lambda node: _as_weighted_rows(node, graph))


def _as_weighted_rows(node: Node, graph: Graph) -> Node:
    if node.op not in ("aten.matmul", "aten.bmm") or len(node.args) != 2 or node.kwargs:
        return node
    weights, value = (graph.defining(argument) for argument in node.args)
    if weights is None or value is None or weights.op != "aten.softmax":
        return node
    if weights.dimensions(1, "dim") != (len(weights.shape),):
        return node
    scale, scores = _attention_scores(graph.defining(weights.args[0]), graph)
    if scores is None:
        return node
    query, turned = scores.args
    key = graph.defining(turned)
    last = len(scores.shape)
    swapped = key is not None and key.op == "aten.transpose" and {*key.args[1:]} == {last - 1, last}
    operands = (query, key.args[0]) if key is not None and swapped else ()
    shapes = [found.shape for found in (graph.defining(o) for o in operands) if found]
    # The rule's coefficients are those of one matrix: leading dimensions must agree.
    if len(shapes) != 2 or any(s[:-2] != node.shape[:-2] for s in (*shapes, value.shape)):
        return node
    return replace(node, op="lipfast.weighted_rows", args=(*node.args, *operands, scale))


def _attention_scores(node: Node | None, graph: Graph) -> tuple[float, Node | None]:
    """The product ``Q K^T`` behind scalings, sums with constants and reshapes of nothing."""
    scale = 1.0
    while node is not None and node.op not in ("aten.matmul", "aten.bmm"):
        if not node.args:  # an input of the model
            return scale, None
        active = [found for value in node.args if (found := graph.defining(value)) is not None]
        factor = _multiplier(node, first=graph.defining(node.args[0]) is not None)
        if len(active) != 1 or node.shape != active[0].shape or factor is None:
            return scale, None
        scale *= factor
        node = active[0]
    return scale, node


def _multiplier(node: Node, *, first: bool) -> float | None:
    """What a node multiplies an activation by, which may stand `first`; None if it does more."""
    if rule_of(node.op).reshapes or node.op in ("aten.where", "aten.masked_fill"):
        return 1.0  # entries that a mask hides do not depend on the query and the key
    if node.op == "aten.add" or (node.op == "aten.sub" and first):
        return 1.0 if node.argument(2, "alpha", 1) == 1 else None
    number = node.args[1] if first and len(node.args) == 2 else None
    if node.op not in ("aten.mul", "aten.div") or not isinstance(number, (int, float)):
        return None
    if not number:
        return None
    return float(number) if node.op == "aten.mul" else 1.0 / number

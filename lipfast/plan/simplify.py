"""Drop what does not change the function, and join what export takes apart.

Every rewriting here is exact in real arithmetic; nothing touches weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lipfast.errors import naming
from lipfast.graph.nodes import Argument, Graph, Node, Reference, defining, substitute
from lipfast.plan.canonical import CASTS, IDENTITIES, TRANSPOSES
from lipfast.rules.registry import rule_of

_PRODUCTS = frozenset({"aten.matmul", "aten.mm"})


def simplify(graph: Graph, floating: Mapping[str, bool], ranks: Mapping[str, int]) -> Graph:
    """Return the same function with fewer nodes.

    Args:
        graph: as traced.
        floating: for each node, whether its result is a floating tensor; for parameters and
            constants alike, under ``kind:name``.
        ranks: number of dimensions of each parameter.

    Returns:
        The graph without identities and unused nodes, with softsign and products with a
        (transposed) parameter recognised.
    """
    graph = _drop_identities(graph, floating)
    graph = _select_before_permuting(graph)
    graph = _join_softsign(graph)
    graph = join_products(graph, ranks)
    return _drop_unused(graph)


def _select_before_permuting(graph: Graph) -> Graph:
    """``x.permute(2, 0, ...)[i]`` becomes ``x.select(2, i).permute(0, ...)``.

    That is how attention takes queries, keys and values apart; between the two the samples are
    not in front.
    """
    by_name = {node.name: node for node in graph.nodes}
    nodes: list[Node] = []
    for node in graph.nodes:
        moved = defining(node.args[0], by_name) if node.op == "aten.select" else None
        if moved is None or moved.op != "aten.permute" or node.dimensions(1, "dim") != (0,):
            nodes.append(node)
            continue
        order = moved.dimensions(1, "dims")
        source = defining(moved.args[0], by_name)
        if source is None or order[0] == 0 or order[1] != 0:
            nodes.append(node)
            continue
        axis = order[0]
        shape = source.shape[: axis - 1] + source.shape[axis:]
        picked = replace(
            node,
            name=f"{node.name}_picked",
            args=(moved.args[0], axis, *node.args[2:]),
            shape=shape,
        )
        rest = tuple(dim - (dim > axis) for dim in order[1:])
        nodes += [
            picked,
            replace(
                moved, name=node.name, args=(Reference("node", picked.name), rest), shape=node.shape
            ),
        ]
    return Graph(tuple(nodes), graph.outputs)


def _rewritten(graph: Graph, nodes: Sequence[Node], replaced: Mapping[str, Argument]) -> Graph:
    outputs = []
    for name in graph.outputs:
        target = replaced.get(name, Reference("node", name))
        outputs.append(target.name if isinstance(target, Reference) else name)
    return Graph(tuple(nodes), tuple(outputs))


def _drop_identities(graph: Graph, floating: Mapping[str, bool]) -> Graph:
    replaced: dict[str, Argument] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        args = tuple(substitute(value, replaced) for value in node.args)
        kwargs = tuple((key, substitute(value, replaced)) for key, value in node.kwargs)
        current = replace(node, args=args, kwargs=kwargs)
        source = args[0] if args else None
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
    return _rewritten(graph, nodes, replaced)


def _floating(source: Argument, floating: Mapping[str, bool]) -> bool:
    """Whether an operand holds floating numbers; integers become such by a cast that stays."""
    if not isinstance(source, Reference):
        return True
    name = source.name if source.kind == "node" else f"{source.kind}:{source.name}"
    return floating.get(name, True)


def _join_softsign(graph: Graph) -> Graph:
    """``x / (1 + |x|)`` is how softsign is exported; as a quotient it would have no rule."""
    by_name = {node.name: node for node in graph.nodes}

    def joined(node: Node) -> Node:
        if node.op == "aten.div" and len(node.args) == 2 and not node.kwargs:
            denominator = defining(node.args[1], by_name)
            if denominator is not None and _is_one_plus_abs(denominator, node.args[0], by_name):
                return replace(node, op="lipfast.softsign", args=node.args[:1])
        return node

    return _each(graph, joined)


def _is_one_plus_abs(node: Node, x: Argument, by_name: Mapping[str, Node]) -> bool:
    if node.op != "aten.add" or node.kwargs or len(node.args) != 2:
        return False
    operand, one = node.args if not isinstance(node.args[0], (int, float)) else node.args[::-1]
    magnitude = defining(operand, by_name)
    is_one = isinstance(one, (int, float)) and float(one) == 1.0
    return (
        is_one and magnitude is not None and magnitude.op == "aten.abs" and magnitude.args == (x,)
    )


def _transposed_parameter(
    argument: Argument, by_name: Mapping[str, Node], ranks: Mapping[str, int]
) -> Reference | None:
    """Find the matrix parameter whose transpose `argument` is."""
    node = defining(argument, by_name)
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
    by_name = {node.name: node for node in graph.nodes}
    return _each(graph, lambda node: _as_linear(node, by_name, ranks))


def _as_linear(node: Node, by_name: Mapping[str, Node], ranks: Mapping[str, int]) -> Node:
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
    transposed = _transposed_parameter(weight, by_name, ranks)
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
    by_name = {node.name: node for node in graph.nodes}
    return _each(graph, lambda node: _as_weighted_rows(node, by_name))


def _as_weighted_rows(node: Node, by_name: Mapping[str, Node]) -> Node:
    if node.op not in ("aten.matmul", "aten.bmm") or len(node.args) != 2 or node.kwargs:
        return node
    weights, value = (defining(argument, by_name) for argument in node.args)
    if weights is None or value is None or weights.op != "aten.softmax":
        return node
    if weights.dimensions(1, "dim") != (len(weights.shape),):
        return node
    scale, scores = _attention_scores(defining(weights.args[0], by_name), by_name)
    if scores is None:
        return node
    query, turned = scores.args
    key = defining(turned, by_name)
    last = len(scores.shape)
    swapped = key is not None and key.op == "aten.transpose" and {*key.args[1:]} == {last - 1, last}
    operands = (query, key.args[0]) if key is not None and swapped else ()
    shapes = [found.shape for found in (defining(o, by_name) for o in operands) if found]
    # The rule's coefficients are those of one matrix: leading dimensions must agree.
    if len(shapes) != 2 or any(s[:-2] != node.shape[:-2] for s in (*shapes, value.shape)):
        return node
    return replace(node, op="lipfast.weighted_rows", args=(*node.args, *operands, scale))


def _attention_scores(node: Node | None, by_name: Mapping[str, Node]) -> tuple[float, Node | None]:
    """The product ``Q K^T`` behind scalings, sums with constants and reshapes of nothing."""
    scale = 1.0
    while node is not None and node.op not in ("aten.matmul", "aten.bmm"):
        if not node.args:  # an input of the model
            return scale, None
        active = [found for value in node.args if (found := defining(value, by_name)) is not None]
        factor = _multiplier(node, first=defining(node.args[0], by_name) is not None)
        if len(active) != 1 or node.shape != active[0].shape or factor is None:
            return scale, None
        scale *= factor
        node = active[0]
    return scale, node


def _multiplier(node: Node, *, first: bool) -> float | None:
    """What a node multiplies an activation by, which may stand `first`; None if it does more."""
    if rule_of(node.op).reshapes:
        return 1.0
    if node.op == "aten.add" or (node.op == "aten.sub" and first):
        return 1.0 if node.argument(2, "alpha", 1) == 1 else None
    number = node.args[1] if first and len(node.args) == 2 else None
    if (
        node.op not in ("aten.mul", "aten.div")
        or not isinstance(number, (int, float))
        or not number
    ):
        return None
    return float(number) if node.op == "aten.mul" else 1.0 / number


def _drop_unused(graph: Graph) -> Graph:
    used = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.name in used or node.op == "input":
            kept.append(node)
            used.update(ref.name for ref in node.references() if ref.kind == "node")
    return Graph(tuple(reversed(kept)), graph.outputs)

"""Recognise what is made of different parts of one activation, and pairs of maxima and minima.

Where ``y = cat(f(a), g(b))`` and a, b are different entries of x, ``||y - y'||^p`` is at most
``L_f^p ||a - a'||^p + L_g^p ||b - b'||^p``: the larger of both constants, not their p-norm.
Bounds only: what is evaluated stays as it was traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Constant, Graph, Node, Reference
from lipfast.rules.parts import group_count, of_parts, takes_parts
from lipfast.rules.registry import rule_of, written_here

_OPPOSITES = (
    {"aten.maximum", "aten.minimum"},
    {"aten.amax", "aten.amin"},
    {"aten.max", "aten.min"},
)
# Entries of an activation whose parts are followed.
_MOST_ENTRIES = 1 << 22


@dataclass(frozen=True)
class _Part:
    """What a node reads of an activation.

    Attributes:
        entries: of the activation, flattened: whether the node depends on them.
        positions: which entry stands where (from 1; 0 for none), if the node only moves them.
    """

    entries: Tensor
    positions: Tensor | None = None


def join_parts(graph: Graph, constants: Mapping[str, Constant]) -> Graph:
    """The graph in which sums and joins of different parts of one activation say so."""
    if not any(takes_parts(node) for node in graph.nodes):
        return graph
    nodes = {node.name: _sorted_pairs(node, graph) for node in graph.nodes}
    for source in _read_in_parts(graph):
        meeting = _meeting(source, graph, tuple(nodes.values()))
        parts = _parts_of(source, graph, constants) if meeting else {}
        for node in meeting:
            groups = _groups(node, parts)
            if len(groups) < group_count(node):
                nodes[node.name] = of_parts(node, groups)
    found = tuple(nodes.values())
    return graph if found == graph.nodes else graph.rewritten(found)


def _sorted_pairs(node: Node, graph: Graph) -> Node:
    """``cat(max(a, b), min(a, b))`` reads a and b: in norm, the pairs are sorted.

    The largest and the smallest of several entries are a part of the sorted ones.
    """
    operands = node.args[0] if node.op in ("aten.cat", "aten.stack") else None
    if not isinstance(operands, tuple) or not written_here(rule_of(node.op)):
        return node
    kept = list(operands)
    for first in range(len(kept)):
        for second in range(first + 1, len(kept)):
            pair = _unsorted(graph.defining(kept[first]), graph.defining(kept[second]), graph)
            if pair is not None:
                kept[first], kept[second] = pair
                break
    if kept == list(operands):
        return node
    left = tuple(value for value in kept if value is not None)
    return of_parts(replace(node, args=(left, *node.args[1:])), ())


def _unsorted(
    first: Node | None, second: Node | None, graph: Graph
) -> tuple[Argument, Argument] | None:
    """What a maximum and a minimum are of; one operand and None if both are of one."""
    if first is None or second is None or {first.op, second.op} not in _OPPOSITES:
        return None
    if not all(written_here(rule_of(node.op)) for node in (first, second)):
        return None
    sources = [graph.defining(value) for value in first.args[:2]]
    if first.op in ("aten.maximum", "aten.minimum"):
        same = {*first.args} == {*second.args} and len({*first.args}) == 2
        whole = all(source is not None and source.shape == first.shape for source in sources)
        return (first.args[0], first.args[1]) if same and whole else None
    dims = first.dimensions(1, "dim")
    size = 1
    for dim in dims:
        size *= sources[0].shape[dim - 1] if sources[0] is not None else 0
    same = first.args == second.args and first.kwargs == second.kwargs
    return (first.args[0], None) if same and size > 1 else None


def _read_in_parts(graph: Graph) -> list[Node]:
    """Activations of which several nodes read something that they move."""
    found = []
    readers = graph.readers
    for node in graph.nodes:
        moving = [name for name in readers.get(node.name, ()) if _moves(graph.node(name))]
        entries = torch.Size(node.shape).numel()
        if len(moving) > 1 and 1 < entries <= _MOST_ENTRIES:
            found.append(node)
    return found


def _meeting(source: Node, graph: Graph, nodes: tuple[Node, ...]) -> list[Node]:
    """Nodes where several meet that depend on the source alone."""
    inside = {source.name}
    for node in graph.nodes:
        names = node.names("node")
        if node.op == "lipfast.repeated" or (names and inside.issuperset(names)):
            inside.add(node.name)
    inside.discard(source.name)
    return [n for n in nodes if takes_parts(n) and len(inside.intersection(n.names("node"))) > 1]


def _moves(node: Node) -> bool:
    rule = rule_of(node.op)
    return (rule.moves or rule.reshapes) and len(node.names("node")) == 1


def _parts_of(source: Node, graph: Graph, constants: Mapping[str, Constant]) -> dict[str, _Part]:
    """For every node that depends on some entries of the source only, which ones."""
    count = torch.Size(source.shape).numel()
    positions = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
    whole = torch.ones(count, dtype=torch.bool, device="cpu")
    found = {source.name: _Part(whole, positions.reshape(source.shape))}
    for node in graph.nodes:
        names = node.names("node")
        if node.op == "lipfast.repeated":  # the same for every sample
            found[node.name] = _Part(~whole)
        elif names and node.name != source.name and all(name in found for name in names):
            part = _followed(node, [found[name] for name in names], constants)
            if not bool(part.entries.all()) or part.positions is not None:
                found[node.name] = part
    return found


def _followed(node: Node, operands: Sequence[_Part], constants: Mapping[str, Constant]) -> _Part:
    entries = torch.stack([part.entries for part in operands]).any(0)
    before = operands[0].positions
    others = [ref.kind for ref in node.references() if ref.kind not in ("batch", "dtype")]
    if before is None or not _moves(node) or not {*others} <= {"node", "constant"}:
        return _Part(entries)

    def moved(values: Tensor) -> Tensor:
        def value(reference: Reference) -> Tensor:
            if reference.kind == "constant":
                return constants[reference.name].tensor()
            return values.unsqueeze(0)

        return call_op(node, value, 1).squeeze(0)

    # What the op puts in by itself (padding) is there for other values, too.
    count = len(entries)
    after, shifted = moved(before), moved(before + count)
    after = torch.where(shifted - after == count, after, 0.0)
    read = torch.zeros(count + 1, dtype=torch.bool, device="cpu")
    read[after.long().flatten()] = True
    return _Part(read[1:], after)


def _groups(node: Node, parts: Mapping[str, _Part]) -> tuple[tuple[int, ...], ...]:
    """Positions of tensor operands, those of different parts together."""
    groups: list[list[int]] = []
    taken: list[Tensor] = []
    for position, reference in enumerate(node.references()):
        part = parts.get(reference.name) if reference.kind == "node" else None
        if part is not None:
            for group, entries in zip(groups, taken, strict=True):
                if not bool((entries & part.entries).any()):
                    group.append(position)
                    entries.logical_or_(part.entries)
                    break
            else:
                groups.append([position])
                taken.append(part.entries.clone())
        elif reference.kind == "node":
            groups.append([position])
            taken.append(torch.ones(1, dtype=torch.bool, device="cpu"))
    return tuple(tuple(group) for group in groups)

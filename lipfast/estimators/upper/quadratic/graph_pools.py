r"""Max pools as maxima of pairs of entries, which have slopes.

A pool is a maximum along one axis, and then along the next; of several entries it is one of two
after the other, and ``max(x, y) = y + relu(x - y)`` holds for real numbers. As a whole a pool is
known by one constant only, which has to allow for windows whose entries all count at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lipfast.graph.nodes import Graph, Node, Reference
from lipfast.rules.pooling import maximum_windows
from lipfast.rules.registry import rule_of, written_here

# So many maxima of pairs, one after the other, are worth their steps; whole channels are not.
_MOST_MAXIMA = 8
# Not decreasing, and the same for all entries: they may come behind a maximum as well.
_NOT_DECREASING = frozenset(
    f"aten.{name}" for name in ("relu", "relu6", "hardtanh", "tanh", "sigmoid", "hardsigmoid")
)
_NEEDED = tuple(f"aten.{name}" for name in ("maximum", "slice", "cat", "relu", "add", "sub"))


def without_max_pools(graph: Graph) -> Graph:
    """The graph in which max pools are `aten.maximum` of slices, before a ReLU that they read."""
    if not all(written_here(rule_of(op)) for op in _NEEDED):
        return graph
    readers = Counter(name for node in graph.nodes for name in node.names("node"))
    readers.update(graph.outputs)
    nodes = {node.name: node for node in graph.nodes}
    found: list[Node] = []
    for node in graph.nodes:
        pool = _Pool.of(node, nodes)
        if pool is None:
            found.append(node)
            continue
        before = nodes[node.reference(0).name]
        if before.op in _NOT_DECREASING and readers[before.name] == 1 and _is_alone(before):
            found.remove(before)
            inner = f"{node.name} before {before.name}"
            found += pool.maxima(before.reference(0), inner)
            args = (Reference("node", inner), *before.args[1:])
            found.append(replace(before, name=node.name, args=args, shape=node.shape))
        else:
            found += pool.maxima(node.reference(0), node.name)
    return Graph(tuple(found), graph.outputs)


def _is_alone(node: Node) -> bool:
    """Whether a function has one operand, and is lipfast's."""
    return len(list(node.references())) == 1 and written_here(rule_of(node.op))


class _Pool:
    """A max pool by its windows along each axis."""

    def __init__(self, node: Node, shape: tuple[int, ...], windows: list[list[list[int]]]) -> None:
        self._node, self._shape, self._windows = node, shape, windows
        self._done: list[Node] = []

    @classmethod
    def of(cls, node: Node, nodes: dict[str, Node]) -> _Pool | None:
        """None for other nodes, windows without an entry, and large windows."""
        windows = None
        if written_here(rule_of(node.op)):
            operand = node.args[0] if node.args else None
            if isinstance(operand, Reference) and operand.kind == "node":
                shape = nodes[operand.name].shape
                windows = maximum_windows(node, shape)
        if windows is None or any(not window for axis in windows for window in axis):
            return None
        maxima = sum(max(map(len, axis)) - 1 for axis in windows)
        return cls(node, shape, windows) if maxima <= _MOST_MAXIMA else None

    def maxima(self, operand: Reference, name: str) -> list[Node]:
        """Nodes that take the maximum of a node, the last of this name."""
        self._done, shape = [], list(self._shape)
        first = len(shape) - len(self._windows)
        for axis, windows in enumerate(self._windows):
            place = first + axis
            shape[place] = len(windows)
            longest = max(map(len, windows))
            members: list[Reference] = []
            for at in range(longest):
                entries = [window[min(at, len(window) - 1)] for window in windows]
                members.append(self._selected(operand, place, entries, shape))
            while len(members) > 1:
                pairs = zip(members[::2], members[1::2], strict=False)
                joined = [self._add("aten.maximum", pair, shape) for pair in pairs]
                members = joined + members[len(joined) * 2 :]
            operand = members[0]
        self._done[-1] = replace(self._done[-1], name=name)
        return self._done

    def _selected(
        self, operand: Reference, place: int, entries: Sequence[int], shape: Sequence[int]
    ) -> Reference:
        """These entries along an axis, in order: slices, side by side where they are several."""
        parts = []
        for start, count, step in _progressions(entries):
            sliced = [*shape[:place], count, *shape[place + 1 :]]
            end = start + (count - 1) * step + 1
            parts.append(self._add("aten.slice", (operand, place + 1, start, end, step), sliced))
        return (
            parts[0] if len(parts) == 1 else self._add("aten.cat", (tuple(parts), place + 1), shape)
        )

    def _add(self, op: str, args: tuple[object, ...], shape: Sequence[int]) -> Reference:
        node = self._node
        name = f"{node.name} part {len(self._done)}"
        self._done.append(Node(name, op, args, (), tuple(shape), node.module))  # type: ignore[arg-type]
        return Reference("node", name)


def _progressions(entries: Sequence[int]) -> list[tuple[int, int, int]]:
    """Start, length and step > 0 of runs that make up a list."""
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < len(entries):
        step, count = 1, 1
        if at + 1 < len(entries) and entries[at + 1] > entries[at]:
            step = entries[at + 1] - entries[at]
            while at + count < len(entries) and entries[at + count] - entries[at] == count * step:
                count += 1
        found.append((entries[at], count, step))
        at += count
    return found

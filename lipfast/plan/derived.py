"""Properties of an architecture that rest on the rules of its ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, overload

from lipfast.graph.nodes import Graph, Node
from lipfast.plan.compositions import by_their_rules
from lipfast.plan.split import without_bound
from lipfast.rules.registry import RULES, Rule, require_rules

Found = TypeVar("Found")
# Ops that graphs for bounds may hold, whatever was traced.
_MADE = {
    *("aten.linear", "aten.maximum", "aten.minimum"),
    *("lipfast.composition", "lipfast.parts", "lipfast.residual"),
}
_KEY = "_derived"
# Ops, their rules, and what was derived under these.
_Kept = tuple[tuple[str, ...], tuple[Rule | None, ...], dict[str, Any]]


class HasGraph(Protocol):
    """What is derived from."""

    @property
    def graph(self) -> Graph:
        """Nodes that depend on the inputs."""

    @property
    def computed(self) -> Sequence[Node]:
        """Nodes on parameters alone."""


class derived(Generic[Found]):  # noqa: N801 (used as a decorator, as property is)
    """A property that is found once, and again where a rule of the graph's ops has changed.

    Raises:
        UnsupportedOpError: an op lost its rule, or the new one does not cover a node.
    """

    def __init__(self, function: Callable[[Any], Found]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> derived[Found]: ...
    @overload
    def __get__(self, instance: HasGraph, owner: type | None = None) -> Found: ...
    def __get__(
        self, instance: HasGraph | None, owner: type | None = None
    ) -> derived[Found] | Found:
        if instance is None:
            return self
        found = _found(instance)
        if self._name not in found:
            found[self._name] = self._function(instance)
        value: Found = found[self._name]
        return value


def underived(state: dict[str, Any]) -> dict[str, Any]:
    """An instance's attributes without what is derived, for copies: rules cannot be pickled."""
    return {name: value for name, value in state.items() if name != _KEY}


def _ops_of(instance: HasGraph) -> tuple[str, ...]:
    return tuple({node.op for node in (*instance.graph.nodes, *instance.computed)} | _MADE)


def _found(instance: HasGraph) -> dict[str, Any]:
    """What was derived under the rules of now."""
    attributes = vars(instance)
    known: _Kept | None = attributes.get(_KEY)
    ops = _ops_of(instance) if known is None else known[0]
    now = tuple(map(RULES.get, ops))  # objects that are the same compare fast
    found: dict[str, Any] = {} if known is None else known[2]
    if known is None or now != known[1]:
        computed = tuple(instance.computed)
        require_rules(by_their_rules(instance.graph), without_bound(instance.graph, computed))
        found = {}
        attributes[_KEY] = ops, now, found
    return found

"""The rule of sums and joins of what depends on different parts of one activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from lipfast.graph.nodes import Argument, Node
from lipfast.norms import Norm, dual_norm
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import Call, rule, rule_of, written_here
from lipfast.rules.upward import Upward, p_norm

_JOINS = frozenset(f"aten.{name}" for name in ("cat", "stack", "maximum", "minimum"))
_SUMS = frozenset(f"aten.{name}" for name in ("add", "sub", "rsub", "mul"))


def takes_parts(node: Node) -> bool:
    """Whether several activations meet in a node, in a way that parts matter to."""
    inner = _without_groups(node) if node.op == "lipfast.parts" else node
    known = inner.op in _JOINS | _SUMS and written_here(rule_of(inner.op))
    return known and len(inner.names("node")) > 1


def group_count(node: Node) -> int:
    """How many groups the operands of a node are in; each is its own where nothing is known."""
    groups = node.args[1] if node.op == "lipfast.parts" else ()
    return len(groups) if isinstance(groups, tuple) and groups else len(node.names("node"))


def of_parts(node: Node, groups: tuple[tuple[int, ...], ...]) -> Node:
    """The node with its tensor operands in groups of those that read different entries."""
    inner = _without_groups(node) if node.op == "lipfast.parts" else node
    alone: Argument = groups
    return replace(inner, op="lipfast.parts", args=(inner.op, alone, *inner.args))


def _without_groups(node: Node) -> Node:
    return replace(node, op=str(node.args[0]), args=node.args[2:])


def _magnitude_of_parts(call: Call) -> Magnitude:
    inner = _without_groups(call.node)
    size = rule_of(inner.op).magnitude
    return Magnitude() if size is None else size(replace(call, node=inner))


def _needs_magnitudes(node: Node) -> bool:
    inner = _without_groups(node)
    product = rule_of(inner.op).product
    return product is not None and product(inner)


@rule("lipfast.parts", product=_needs_magnitudes, magnitude=_magnitude_of_parts)
def join_of_parts(call: Call) -> Upward:
    """With ``||f_i(x_i) - f_i(x_i')|| <= c_i ||x_i - x_i'||`` for different parts x_i of one x.

    Joined: the largest c_i. Added (or multiplied, with the sizes in c_i): the dual norm of the c_i,
    their largest for p = 1, the root of the sum of squares for p = 2, their sum for p = inf.
    Constants are proportional to those of x, so c_i times that of x is what the op makes of its
    operand i alone. Operands that read the same entries are taken together as usual.

    Stands for a node in graphs that bounds are computed on; it is never evaluated.
    """
    inner = replace(call, node=_without_groups(call.node))
    bound = rule_of(inner.node.op).bound
    groups = cast("tuple[tuple[int, ...], ...]", call.node.args[1])
    if not groups:
        return _kept(call, inner, bound(inner))
    zero = Upward.of(0.0)
    totals = []
    for group in groups:
        alone: list[Upward] = []
        for chosen in group:
            only = [c if i == chosen else zero for i, c in enumerate(call.operands)]
            one = replace(inner, operands=only)
            alone.append(_kept(call, one, bound(one)))
        totals.append(_together(alone, inner.node.op, call.norm))
    return p_norm(totals, call.norm if inner.node.op in _JOINS else 1)


def _kept(call: Call, inner: Call, found: Upward | float) -> Upward:
    """What the rule of the op says, with its reason."""
    call.reason = call.reason or inner.reason
    return found if isinstance(found, Upward) else Upward.of(found)


def _together(alone: Sequence[Upward], op: str, norm: Norm) -> Upward:
    return p_norm(alone, math.inf if op in _JOINS else dual_norm(norm))

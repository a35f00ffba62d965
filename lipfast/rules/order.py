"""Rules of ops that put entries in order: sort and the largest ones."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.rules.pooling import same_entries
from lipfast.rules.registry import Arguments, Call, Dimensions, Errors, rule
from lipfast.rules.upward import Upward

_POSITION = {"aten.sort": 1, "aten.topk": 2}


def _axis(node: Node) -> int:
    """The dimension along which entries are put in order; 0 is the samples."""
    found = node.dimensions(_POSITION[node.op], "dim")
    return found[0] if found else len(node.shape)


def _orders_within(node: Node) -> str | None:
    return None if _axis(node) else "over the samples"


def _ordered(arguments: Arguments) -> Tensor:
    node, x = arguments.node, arguments.value(arguments.node.args[0])
    axis = _axis(node) + 1
    if node.op == "aten.sort":
        return x.sort(axis, node.argument(2, "descending", False) is True).values
    largest = node.argument(3, "largest", True) is not False
    return x.topk(int(node.number(1, "k", 1)), axis, largest).values


def _error_of_order(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """The largest error along the axis: the n-th of numbers moves by no more."""
    if errors[0] is None:
        return torch.zeros_like(output)
    return errors[0].amax(_axis(arguments.node) + 1, keepdim=True).expand_as(output).clone()


_order_rule = partial(
    rule,
    supports=_orders_within,
    evaluate=_ordered,
    error=_error_of_order,
    magnitude=same_entries,
    leading=True,
)


@_order_rule("aten.sort", dimensions=Dimensions({1: "dim"}, default=-1))
@_order_rule("aten.topk", dimensions={2: "dim"})
def order(call: Call) -> Upward:
    """1 in every norm: ``||sort x - sort y||_p <= ||x - y||_p``; the largest are a part of it."""
    return call.input

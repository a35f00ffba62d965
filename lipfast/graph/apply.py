"""The ATen op of a node: called on tensors, and what its schema says."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference, is_floating_dtype


def call_op(
    node: Node, value: Callable[[Reference], Tensor], samples: int, *, double: bool = False
) -> Tensor:
    """The result of a node's op; of several results, the first.

    Args:
        node: names the op and its arguments.
        value: the tensor that a reference stands for.
        samples: what a reference to the number of samples stands for.
        double: floating dtypes among the arguments stand for float64.
    """

    def resolve(argument: Argument) -> Any:
        if isinstance(argument, tuple):
            return [resolve(entry) for entry in argument]
        if not isinstance(argument, Reference):
            return argument
        if argument.kind == "batch":
            return samples * int(argument.name or 1)
        if argument.kind == "dtype":
            return (
                torch.float64
                if double and is_floating_dtype(argument)
                else getattr(torch, argument.name)
            )
        return value(argument)

    result = _operator(node.op)(
        *(resolve(argument) for argument in node.args),
        **{key: resolve(argument) for key, argument in node.kwargs},
    )
    if isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, Tensor)
    return result


def named_argument(node: Node, name: str) -> Argument:
    """The argument that the op's schema calls `name`, or its default; None if it has none."""
    position, default = _schema(node.op).get(name, (len(node.args), None))
    return node.argument(position, name, default)


@lru_cache(maxsize=64)
def _schema(op: str) -> dict[str, tuple[int, Argument]]:
    """Name -> position and default of the arguments of an op's first overload."""
    arguments = _operator(op).default._schema.arguments
    return {entry.name: (index, entry.default_value) for index, entry in enumerate(arguments)}


def _operator(op: str) -> Any:
    namespace, name = op.split(".")
    return getattr(getattr(torch.ops, namespace), name)

"""Call the ATen op of a node on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference


def call_op(node: Node, value: Callable[[Reference], Tensor], samples: int) -> Tensor:
    """The result of a node's op; of several results, the first.

    Args:
        node: names the op and its arguments.
        value: the tensor that a reference stands for.
        samples: what a reference to the number of samples stands for.
    """

    def resolve(argument: Argument) -> Any:
        if isinstance(argument, tuple):
            return [resolve(entry) for entry in argument]
        if not isinstance(argument, Reference):
            return argument
        if argument.kind == "batch":
            return samples * int(argument.name or 1)
        if argument.kind == "dtype":
            return getattr(torch, argument.name)
        return value(argument)

    namespace, name = node.op.split(".")
    operator = getattr(getattr(torch.ops, namespace), name)
    result = operator(
        *(resolve(argument) for argument in node.args),
        **{key: resolve(argument) for key, argument in node.kwargs},
    )
    if isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, Tensor)
    return result

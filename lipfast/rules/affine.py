"""Rules of affine maps: the Lipschitz constant is the operator norm of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lipfast.graph.nodes import Node, Reference
from lipfast.ops import chain_stages
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import Arguments, Call, Errors, LayerRequest, rule
from lipfast.rules.running_errors import error_of_linear_map
from lipfast.rules.upward import Upward


def _affine_layer(node: Node) -> LayerRequest:
    return LayerRequest("linear", node.reference(1).name, transposed=node.op == "lipfast.matmul")


def parameters_supported(node: Node) -> str | None:
    """Weight and bias must be parameters: what depends on the input has no fixed norm."""
    weight, bias = node.args[1], node.argument(2, "bias")
    if not (isinstance(weight, Reference) and weight.kind == "parameter"):
        return "its weight is computed, not a parameter"
    if bias is not None and not (isinstance(bias, Reference) and bias.kind == "parameter"):
        return "its bias is computed, not a parameter"
    return None


def _affine_operands(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    node = arguments.node
    bias = node.argument(2, "bias")
    weight = arguments.value(node.args[1])
    if node.op != "lipfast.matmul":
        weight = weight.mT
    return arguments.value(node.args[0]), weight, None if bias is None else arguments.value(bias)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight + bias`` for x (N, C, ..., in), weight (N, in, out), bias (N, out)."""
    rows = x.flatten(1, -2)
    if bias is None:
        product = torch.bmm(rows, weight)
    else:
        product = torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return product.reshape(*x.shape[:-1], -1)


def _evaluate_affine(arguments: Arguments) -> Tensor:
    return _apply(*_affine_operands(arguments))


def _affine_error(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """``gamma_{n+2} (|W| (|x| + e / gamma_{n+2}) + |b|)``."""
    x, weight, bias = _affine_operands(arguments)
    size, shift = weight.abs(), None if bias is None else bias.abs()
    terms = weight.shape[1]
    return error_of_linear_map(
        lambda h: _apply(h, size, shift), x, errors[0], roundings=terms + 2, room=terms + 8
    )


def _affine_magnitude(call: Call) -> Magnitude:
    """``||W x + b|| <= ||W||_2 ||x|| + ||b||`` row by row (only for the norm 2)."""
    weight, bias = call.node.reference(1), call.node.argument(2, "bias")
    # Folded tensors carry roundings, which the norm of the layer accounts for and a bias does not.
    if call.norm != 2 or "folded:" in weight.name:
        return Magnitude()
    found = Magnitude(row=call.magnitudes[0].row * call.layer)
    if bias is None:
        return Magnitude(found.row, found.row, call.magnitudes[0].total * call.layer)
    size = call.magnitudes[-1]  # the bias is the last tensor argument
    return Magnitude(row=found.row + size.total)


def _linear_stage(node: Node, shape: tuple[int, ...]) -> Sequence[chain_stages.Stage] | None:
    return [chain_stages.Linear()] if len(shape) == 1 else None


_linear_rule = partial(
    rule,
    layer=_affine_layer,
    supports=parameters_supported,
    evaluate=_evaluate_affine,
    error=_affine_error,
    magnitude=_affine_magnitude,
    parameter_errors="multiplied",
    stage=_linear_stage,
)


@_linear_rule("aten.linear", leading=True, affine="matrix")
@_linear_rule("lipfast.matmul", affine="transposed matrix")
def linear(call: Call) -> Upward:
    """``L(W x + b) = ||W|| L(x)``; applied to the last dimension, whatever stands before it.

    ``lipfast.matmul`` is ``x @ W``. For positions in front of the features the operator is
    block diagonal with equal blocks and has the same norm.
    """
    return call.input * call.layer

"""Rules of convolutions: the Lipschitz constant is the operator norm at the true input size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.ops import chain_stages
from lipfast.rules.affine import parameters_supported
from lipfast.rules.registry import Arguments, Call, ConvSettings, Errors, LayerRequest, rule
from lipfast.rules.running_errors import error_of_linear_map
from lipfast.rules.upward import Upward


def settings(node: Node) -> ConvSettings:
    """Read the arguments of ``aten.conv{1,2,3}d``, their transposed kin or ``aten.convolution``."""
    axes = len(node.shape) - 1

    def axis(position: int, name: str, default: int) -> tuple[int, ...]:
        return node.integers(position, name, axes, default)

    stride = axis(3, "stride", 1)
    if node.op == "aten.convolution":
        return ConvSettings(
            stride,
            axis(4, "padding", 0),
            axis(5, "dilation", 1),
            int(node.number(8, "groups", 1)),
            axis(7, "output_padding", 0),
            bool(node.argument(6, "transposed")),
        )
    if node.op.startswith("aten.conv_transpose"):
        return ConvSettings(
            stride,
            axis(4, "padding", 0),
            axis(7, "dilation", 1),
            int(node.number(6, "groups", 1)),
            axis(5, "output_padding", 0),
            transposed=True,
        )
    named = node.argument(4, "padding") if isinstance(node.argument(4, "padding"), str) else None
    dilation, groups = axis(5, "dilation", 1), int(node.number(6, "groups", 1))
    if node.argument(7, "padding_mode") == "circular":  # see `plan.circular`
        wrapped = cast("tuple[tuple[int, int], ...]", node.args[4])
        return ConvSettings(stride, (0,) * axes, dilation, groups, wrapped=wrapped)
    if named == "same":
        return ConvSettings(stride, "same", dilation, groups)
    padding = (0,) * axes if named == "valid" else axis(4, "padding", 0)
    return ConvSettings(stride, padding, dilation, groups)


def _convolution_layer(node: Node) -> LayerRequest:
    found = settings(node)
    kind = f"conv{len(node.shape) - 1}d" + (" transposed" if found.transposed else "")
    kind += " circular" if found.circular else ""
    return LayerRequest(kind, node.reference(1).name, convolution=found)


def _convolution_error(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """``gamma_{n+2} (|W| * (|x| + e / gamma_{n+2}) + |b|)`` for n terms, as for a matrix.

    Algorithms that transform (Fourier, Winograd) are excluded: torch has none for float64 on a
    processor, and `estimators.enclosure` turns cuDNN off.
    """
    node = arguments.node
    x, weight, bias = node.reference(0), node.reference(1), node.operand(2, "bias")
    shape = arguments.shape(weight)
    transposed = settings(node).transposed
    # A transposed kernel is (in, out / groups, ...): at most that many terms meet in one output.
    terms = math.prod(shape) // shape[1] if transposed else math.prod(shape[1:])
    sizes = {weight: arguments.value(weight).abs()}
    if bias is not None:
        sizes[bias] = arguments.value(bias).abs()

    def apply(size: Tensor) -> Tensor:
        return arguments.apply({x: size, **sizes})

    value = arguments.value(x)
    return error_of_linear_map(apply, value, errors[0], roundings=terms + 2, room=terms + 8)


def _convolution_stage(node: Node, shape: tuple[int, ...]) -> Sequence[chain_stages.Stage] | None:
    found = settings(node)
    if found.padding == "same":
        return None  # the kernel's size is not known here, and the padding may be uneven
    return [chain_stages.ConvStage(found.stride, found.padding, found.dilation, found.groups)]


_convolution_rule = partial(
    rule,
    layer=_convolution_layer,
    supports=parameters_supported,
    error=_convolution_error,
    parameter_errors="multiplied",
)


@_convolution_rule("aten.conv1d", "aten.conv2d", affine="convolution", stage=_convolution_stage)
@_convolution_rule("aten.conv3d", affine="convolution")
@_convolution_rule(
    "aten.conv_transpose1d",
    "aten.conv_transpose2d",
    "aten.conv_transpose3d",
    affine="transposed convolution",
)
@_convolution_rule("aten.convolution")
def convolution(call: Call) -> Upward:
    """``L(W * x + b) = ||W *|| L(x)``, the norm of the linear map between samples of this size.

    A transposed convolution is the adjoint of the convolution with the same kernel.
    """
    return call.input * call.layer

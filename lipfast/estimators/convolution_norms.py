"""Brackets of the operator norms of convolutions at their true input size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lipfast.plan.plan import Layer
from lipfast.rules.registry import Convolution, Norm
from lipfast.rules.rounding import UNIT_ROUNDOFF


@dataclass(frozen=True)
class NormBracket:
    """Lower and upper estimate of one operator norm.

    Attributes:
        lower: certified lower end.
        upper: certified upper end.
        method: how it was got.
        passes: applications of the operator that it took.
    """

    lower: float
    upper: float
    method: str
    passes: int = 0


def convolution_brackets(
    layers: Sequence[Layer], weights: Sequence[Tensor], norm: Norm
) -> list[NormBracket]:
    """Certified brackets of the norms of convolutions, for samples of the layers' sizes.

    Norms 1 and inf are the largest column and row sums of magnitudes, exact but for rounding. The
    norm 2 is at most ``sqrt(||.||_1 ||.||_inf)`` (method ``holder``: loose by a factor that grows
    with the number of channels) and at least the Euclidean norm of the largest column.

    Args:
        layers: one per weight, with `Layer.convolution`.
        weights: kernels.
        norm: 1, 2 or inf.

    Returns:
        One bracket per layer.
    """
    return [
        _bracket(layer, weight.detach().to(torch.float64), norm)
        for layer, weight in zip(layers, weights, strict=True)
    ]


def _bracket(layer: Layer, weight: Tensor, norm: Norm) -> NormBracket:
    settings = layer.convolution
    assert settings is not None
    sizes, other = layer.input_shape[1:], layer.output_shape[1:]
    if settings.transposed:  # the adjoint: rows are columns, and the output is its input
        settings, sizes = replace(settings, transposed=False), other
        norm = {1: math.inf, math.inf: 1}.get(norm, norm)
    roundings = 8 + weight.numel() // min(weight.shape[0], weight.shape[1])
    slack = 1.0 + 4 * roundings * UNIT_ROUNDOFF
    magnitude = weight.abs()
    if norm == 1 or math.isinf(norm):
        value = _largest_sum(magnitude, settings, sizes, columns=norm == 1)
        return NormBracket(value / slack, value * slack, "sums of magnitudes", 1)
    column = _largest_sum(magnitude, settings, sizes, columns=True)
    row = _largest_sum(magnitude, settings, sizes, columns=False)
    upper = math.sqrt(column) * math.sqrt(row) * slack
    # Squares are taken of entries scaled to 1, so that they neither overflow nor all vanish.
    peak = float(magnitude.max()) or 1.0
    squares = _largest_sum((magnitude / peak).square(), settings, sizes, columns=True)
    return NormBracket(min(math.sqrt(squares) * peak / slack, upper), upper, "holder", 1)


def _largest_sum(
    magnitude: Tensor, settings: Convolution, sizes: Sequence[int], *, columns: bool
) -> float:
    """Largest row or column sum of the operator with the non-negative kernel `magnitude`.

    A row sum is the convolution of ones: channels are summed first, positions by a convolution with
    one input channel per group. A column sum is the transposed convolution of ones.
    """
    axes, groups = len(sizes), settings.groups
    sides = settings.sides(magnitude.shape[2:])
    flat = [side for pair in reversed(sides) for side in pair]
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    if not columns:
        kernel = magnitude.sum(1, keepdim=True)
        ones = functional.pad(magnitude.new_ones(1, 1, *sizes), flat)
        rows = convolve(ones, kernel, stride=settings.stride, dilation=settings.dilation)
        return float(rows.max())
    blocks = magnitude.reshape(groups, -1, *magnitude.shape[1:]).sum(1)
    kernel = blocks.reshape(1, -1, *magnitude.shape[2:])  # (1, channels in, ...)
    padded = [size + sum(pair) for size, pair in zip(sizes, sides, strict=True)]
    counts = [
        (size - step * (length - 1) - 1) // stride + 1
        for size, length, stride, step in zip(
            padded, magnitude.shape[2:], settings.stride, settings.dilation, strict=True
        )
    ]
    transposed = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )[axes - 1]
    ones = magnitude.new_ones(1, 1, *counts)
    sums = transposed(ones, kernel, stride=settings.stride, dilation=settings.dilation)
    # Cut the padding off again; what no window reaches is missing at the end, and zero.
    for axis, ((before, _), size) in enumerate(zip(sides, sizes, strict=True), start=2):
        length = min(size, sums.shape[axis] - before)
        sums = sums.narrow(axis, before, max(0, length))
    return float(sums.max()) if sums.numel() else 0.0

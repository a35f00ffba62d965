"""Brackets of the operator norms of convolutions at their true input size.

Part of the proof of upper bounds: norms 1 and inf and `holder_bound` are proved here, norm 2 in
`lipfast.ops.conv_norms`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lipfast.errors import ArgumentError
from lipfast.norms import Norm, dual_norm
from lipfast.ops.conv_norms import ConvStart, conv_norms
from lipfast.plan.layers import Layer
from lipfast.rounding import widened
from lipfast.rules.registry import ConvSettings

# A gap of 1e-6 is not worth what it would cost here.
SMALLEST_RTOL = 1e-3

# Kernels with larger entries are multiplied by a power of two before their magnitudes are added up.
_HUGE = 2.0**900
_SHRINKING = 2.0**-100


@dataclass(frozen=True)
class NormBracket:
    """Lower and upper estimate of one operator norm.

    Attributes:
        lower: lower end.
        upper: upper end.
        certified: whether both are proved.
        method: how it was got.
        passes: applications of the operator that it took.
        start: what a later call at similar weights may start from.
    """

    lower: float
    upper: float
    certified: bool
    method: str
    passes: int = 0
    start: ConvStart | None = None


def convolution_brackets(
    layers: Sequence[Layer],
    weights: Sequence[Tensor],
    norm: Norm,
    *,
    rtol: float = SMALLEST_RTOL,
    seed: int = 0,
    start: Sequence[Tensor | ConvStart | None] | None = None,
) -> list[NormBracket]:
    """Brackets of the norms of convolutions, for samples of the layers' sizes.

    Norm 2 is `lipfast.ops.conv_norms`, one native call for all. Norms 1 and inf are the largest
    column and row sums of magnitudes, exact but for rounding.

    Args:
        layers: one per weight, with `Layer.convolution`.
        weights: kernels.
        norm: 1, 2 or inf.
        rtol: relative gap of the bracket of the symbol's supremum, at least `SMALLEST_RTOL`.
        seed: of start vectors.
        start: for each weight the `start` of an earlier bracket, or None.

    Returns:
        One bracket per layer.

    Raises:
        ArgumentError: a start is of another kind or size.
    """
    if not layers:
        return []
    if norm != 2:
        return [
            _sums(layer, weight.detach().to(torch.float64), norm)
            for layer, weight in zip(layers, weights, strict=True)
        ]
    names = ("stride", "dilation", "groups", "transposed")
    settings = [_settings(layer) for layer in layers]
    keys = [str(index) for index in range(len(layers))]
    options: dict[str, Any] = {
        name: _by_key(keys, [getattr(one, name) for one in settings]) for name in names
    }
    result = conv_norms(
        _by_key(keys, [weight.detach() for weight in weights]),
        input_sizes=_by_key(keys, [layer.input_shape[1:] for layer in layers]),
        output_padding=_by_key(keys, [entry.output_padding or 0 for entry in settings]),
        padding=_by_key(keys, [entry.wrapped or entry.padding for entry in settings]),
        padding_mode=_by_key(
            keys, ["circular" if entry.circular else "zeros" for entry in settings]
        ),
        rtol=max(rtol, SMALLEST_RTOL),
        seed=seed,
        start=_started(layers, keys, start or [None] * len(layers)),
        **options,
    )
    return [
        NormBracket(
            float(result.lower[key]),
            float(result.upper[key]),
            bool(result.certified[key]),
            result.method[key],
            int(result.passes[key]),
            result.start_of(key),
        )
        for key in keys
    ]


def _settings(layer: Layer) -> ConvSettings:
    assert layer.convolution is not None
    return layer.convolution


def _by_key(keys: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(keys, values, strict=True))


def _started(
    layers: Sequence[Layer],
    keys: Sequence[str],
    start: Sequence[Tensor | ConvStart | None],
) -> dict[str, ConvStart]:
    """What `conv_norms` starts from, of the layers that have something."""
    known: dict[str, ConvStart] = {}
    for layer, key, entry in zip(layers, keys, start, strict=True):
        if entry is None:
            continue
        if not isinstance(entry, ConvStart):
            raise ArgumentError(
                f"start: '{layer.parameter}' is a convolution's: expected what an earlier call "
                f"gave (Tracker.vectors), got {type(entry).__name__}"
            )
        sizes = tuple(entry.right.shape), tuple(entry.left.shape)
        if sizes != (layer.input_shape, layer.output_shape):
            raise ArgumentError(
                f"start: '{layer.parameter}' was applied to samples of shape "
                f"{sizes[0]}, now of {layer.input_shape}"
            )
        known[key] = entry
    return known


def holder_bound(layer: Layer, weight: Tensor) -> float:
    """``sqrt(||.||_1 ||.||_inf)`` of the convolution, at least its norm 2; rounded up."""
    column, row = (_sums(layer, weight.detach().double(), norm).upper for norm in (1, math.inf))
    return math.nextafter(widened(math.sqrt(column) * math.sqrt(row), 4), math.inf)


def _sums(layer: Layer, weight: Tensor, norm: Norm) -> NormBracket:
    settings, sizes = _settings(layer), layer.input_shape[1:]
    if settings.transposed:  # the adjoint: rows are columns, and the output is its input
        settings, sizes = replace(settings, transposed=False), layer.output_shape[1:]
        norm = dual_norm(norm)
    # Twice as many as there are in the longest sum, and in what follows it.
    roundings = 2 * (8 + weight.numel() // min(weight.shape[0], weight.shape[1]))
    magnitude = weight.abs()
    # Sums must not overflow: inf is no lower end, and inf times the zeros of padding is NaN. What a
    # power of two so small makes of denormal entries is far below the slack.
    scale = _SHRINKING if float(magnitude.max()) > _HUGE else 1.0
    value = _largest_sum(magnitude * scale, settings, sizes, columns=norm == 1)
    lower = min(value / widened(1.0, roundings) / scale, sys.float_info.max)
    if settings.circular and _wraps_onto_itself(settings, weight.shape[2:], sizes):
        lower = 0.0  # taps of different signs may meet in one entry
    return NormBracket(lower, widened(value, roundings) / scale, True, "sums of magnitudes", 1)


def _wraps_onto_itself(settings: ConvSettings, kernel: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether two taps of one window may read the same entry."""
    return any(
        step * (length - 1) >= size
        for step, length, size in zip(settings.dilation, kernel, sizes, strict=True)
    )


def _largest_sum(
    magnitude: Tensor, settings: ConvSettings, sizes: Sequence[int], *, columns: bool
) -> float:
    """Largest row or column sum of the operator with the non-negative kernel `magnitude`.

    A row sum is the convolution of ones: channels are summed first, positions by a convolution with
    one input channel per group. A column sum is the transposed convolution of ones, and what it
    puts into circular padding belongs to the entries that are read there.
    """
    axes, groups = len(sizes), settings.groups
    sides = settings.sides(magnitude.shape[2:])
    flat = [side for pair in reversed(sides) for side in pair]
    strides: dict[str, Any] = {"stride": settings.stride, "dilation": settings.dilation}
    if not columns:
        kernel = magnitude.sum(1, keepdim=True)
        ones = magnitude.new_ones(1, 1, *sizes)
        ones = functional.pad(ones, flat, value=1.0 if settings.circular else 0.0)
        return float(getattr(functional, f"conv{axes}d")(ones, kernel, **strides).max())
    blocks = magnitude.reshape(groups, -1, *magnitude.shape[1:]).sum(1)
    kernel = blocks.reshape(1, -1, *magnitude.shape[2:])  # (1, channels in, ...)
    padded = [size + sum(pair) for size, pair in zip(sizes, sides, strict=True)]
    counts = [
        (size - step * (length - 1) - 1) // stride + 1
        for size, length, stride, step in zip(
            padded, magnitude.shape[2:], settings.stride, settings.dilation, strict=True
        )
    ]
    ones = magnitude.new_ones(1, 1, *counts)
    sums: Tensor = getattr(functional, f"conv_transpose{axes}d")(ones, kernel, **strides)
    # Cut the padding off again; what no window reaches is missing at the end, and zero.
    for axis, ((before, _), size) in enumerate(zip(sides, sizes, strict=True), start=2):
        if settings.circular:
            read = (torch.arange(sums.shape[axis], device=sums.device) - before) % size
            shape = (*sums.shape[:axis], size, *sums.shape[axis + 1 :])
            sums = sums.new_zeros(shape).index_add_(axis, read, sums)
            continue
        length = min(size, sums.shape[axis] - before)
        sums = sums.narrow(axis, before, max(0, length))
    return float(sums.max()) if sums.numel() else 0.0

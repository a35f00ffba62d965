"""Brackets of the operator norms of convolutions at their true input size.

Part of the proof of upper bounds: norms 1 and inf and `holder` are proved here, norm 2 in
`lipfast.ops.conv_norms`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lipfast.errors import ArgumentError
from lipfast.norms import Norm, dual_norm
from lipfast.ops._arguments import check_integer, check_rtol
from lipfast.ops._conv_operator import ConvOperator, conv_operator
from lipfast.ops.conv_norms import ConvStart, conv_norms
from lipfast.ops.conv_norms_later import ConvNorm, ConvNormsLater
from lipfast.ops.fetched import Fetched
from lipfast.ops.spectral_norms import DEFAULT_MEMORY
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
        start: what a later call at similar weights may start from, when somebody asks.
    """

    lower: float
    upper: float
    certified: bool
    method: str
    passes: int = 0
    start: Callable[[], ConvStart] | None = None


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
        pairs = zip(layers, weights, strict=True)
        sums = [sums_of_kernels(layer, weight[None], norm) for layer, weight in pairs]
        return [own()[0] for own in sums]
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
            partial(result.start_of, key),
        )
        for key in keys
    ]


def brackets_later(
    layers: Sequence[Layer], weights: Sequence[Tensor], *, rtol: float, seed: int
) -> Callable[[], list[list[NormBracket]]]:
    """Brackets of norm 2 of many networks' convolutions on a device: by layers, then networks.

    All are queued before anybody waits. What one look does not bound to `rtol` is looked for again,
    all of it together, and what that leaves by `conv_norms`, which raises what is wrong with
    numbers.

    Args:
        layers: as of `convolution_brackets`.
        weights: theirs, (N, *kernel), float32 or float64.
        rtol: see `convolution_brackets`.
        seed: of start vectors.
    """
    rtol = max(rtol, SMALLEST_RTOL)
    check_rtol(rtol)
    check_integer("seed", seed, 0)
    queued: list[ConvNormsLater | None] = []
    for layer, stack in zip(layers, weights, strict=True):
        conv, memory = operator_of(layer, stack[0]), DEFAULT_MEMORY
        fits = ConvNormsLater.takes(conv, memory)
        own = ConvNormsLater(conv, stack, rtol=rtol, seed=seed, memory=memory) if fits else None
        queued.append(own)

    def read() -> list[list[NormBracket]]:
        first = [None if own is None else own.norms() for own in queued]
        wide = [[i for i, norm in enumerate(norms or []) if not norm.reached] for norms in first]
        for own, kernels in zip(queued, wide, strict=True):
            if own is not None:
                own.look_again(kernels)
        if any(wide):
            first = [None if own is None else own.norms() for own in queued]
        found = [[_taken(norm) for norm in own or []] for own in first]
        open_ = [
            (position, network)
            for position, own in enumerate(first)
            for network in range(len(weights[position]))
            if own is None or not own[network].reached
        ]
        again = convolution_brackets(
            [layers[position] for position, _ in open_],
            [weights[position][network] for position, network in open_],
            2,
            rtol=rtol,
            seed=seed,
        )
        for (position, network), bracket in zip(open_, again, strict=True):
            if first[position] is None:
                found[position].append(bracket)
            elif not found[position][network].upper < bracket.upper:
                found[position][network] = bracket
        return found

    return read


def _taken(norm: ConvNorm) -> NormBracket:
    return NormBracket(norm.lower, norm.upper, norm.certified, norm.method, norm.passes, norm.start)


def operator_of(layer: Layer, weight: Tensor) -> ConvOperator:
    """A convolution of samples of the layer's size."""
    entry = _settings(layer)
    return conv_operator(
        weight,
        f"'{layer.parameter}'",
        input_size=layer.input_shape[1:],
        stride=entry.stride,
        padding=entry.wrapped or entry.padding,
        dilation=entry.dilation,
        groups=entry.groups,
        padding_mode="circular" if entry.circular else "zeros",
        transposed=entry.transposed,
        output_padding=entry.output_padding or 0,
    )


def is_matrix(conv: ConvOperator) -> bool:
    """Whether the norm is that of one matrix for each group, and attained on this input size.

    That is so for one tap, where some window reads no padding.
    """
    *taps, _, _ = conv.taps_shape()[1:]
    whole = True
    for axis, (size, (left, _)) in enumerate(zip(conv.input_size, conv.pads, strict=True)):
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        begins = range(-left, size, conv.stride[axis])[: conv.output_size[axis]]
        whole &= any(begin >= 0 and begin + reach < size for begin in begins)
    return set(taps) == {1} and whole and conv.padding_factor()[0] == 1


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
        checked = check_start(layer, entry)
        if checked is not None:
            known[key] = checked
    return known


def check_start(layer: Layer, entry: Tensor | ConvStart | None) -> ConvStart | None:
    """A start that fits a convolution, if there is one.

    Raises:
        ArgumentError: it is of another kind or size.
    """
    if entry is None:
        return None
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
    return entry


def sums_of_kernels(layer: Layer, weights: Tensor, norm: Norm) -> Callable[[], list[NormBracket]]:
    """Norms 1 or inf of one layer of many networks, (N, *kernel), when somebody asks.

    On a device they are computed together and on their way; on the CPU one by one, as libraries may
    sum in another order where there are more channels.
    """
    stacks = torch.split(weights, 1) if weights.is_cpu else [weights]
    sums = [_KernelSums(layer, stack.detach(), norm) for stack in stacks]
    return lambda: [bracket for own in sums for bracket in own.brackets()]


def holder(column: NormBracket, row: NormBracket) -> float:
    """At least the norm 2, from brackets of the norms 1 and inf."""
    return math.nextafter(widened(math.sqrt(column.upper) * math.sqrt(row.upper), 4), math.inf)


class _KernelSums:
    """Norms 1 or inf of one layer of many networks, on their way from a device.

    Args:
        layer: a convolution.
        weights: kernels, (N, *shape).
        norm: 1 or inf.
    """

    def __init__(self, layer: Layer, weights: Tensor, norm: Norm) -> None:
        settings, sizes = _settings(layer), layer.input_shape[1:]
        if settings.transposed:  # the adjoint: rows are columns, and the output is its input
            settings, sizes = replace(settings, transposed=False), layer.output_shape[1:]
            norm = dual_norm(norm)
        shape = weights.shape[1:]
        # Twice as many as there are in the longest sum, and in what follows it.
        self._roundings = 2 * (8 + shape.numel() // min(shape[0], shape[1]))
        magnitude = weights.to(torch.float64).abs()
        # Sums must not overflow: inf is no lower end, and inf times the zeros of padding is NaN.
        # What a power of two so small makes of denormal entries is far below the slack.
        peaks = magnitude.flatten(1).amax(1)
        scales = torch.ones_like(peaks).masked_fill_(peaks > _HUGE, _SHRINKING)
        scaled = magnitude * scales.reshape(-1, *[1] * len(shape))
        sums = _largest_operator_sums(scaled, settings, sizes, columns=norm == 1)
        # Taps of different signs may meet in one entry.
        self._meet = settings.circular and _wraps_onto_itself(settings, shape[2:], sizes)
        self._read = Fetched([sums, scales])

    def brackets(self) -> list[NormBracket]:
        """One per network."""
        sums, scales = (numbers.tolist() for numbers in self._read.read())
        return [self._bracket(*pair) for pair in zip(sums, scales, strict=True)]

    def _bracket(self, value: float, scale: float) -> NormBracket:
        lower = min(value / widened(1.0, self._roundings) / scale, sys.float_info.max)
        upper = widened(value, self._roundings) / scale
        return NormBracket(0.0 if self._meet else lower, upper, True, "sums of magnitudes", 1)


def _wraps_onto_itself(settings: ConvSettings, kernel: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether two taps of one window may read the same entry."""
    return any(
        step * (length - 1) >= size
        for step, length, size in zip(settings.dilation, kernel, sizes, strict=True)
    )


def _largest_operator_sums(
    magnitudes: Tensor, settings: ConvSettings, sizes: Sequence[int], *, columns: bool
) -> Tensor:
    """Largest row or column sums of operators with the non-negative kernels `magnitudes`.

    A row sum is the convolution of ones: channels are summed first, positions by a convolution with
    one input channel per group. A column sum is the transposed convolution of ones, and what it
    puts into circular padding belongs to the entries that are read there. The channels of many
    kernels are those of one.
    """
    axes, groups, count = len(sizes), settings.groups, len(magnitudes)
    sides = settings.sides(magnitudes.shape[3:])
    flat = [side for pair in reversed(sides) for side in pair]
    strides: dict[str, Any] = {"stride": settings.stride, "dilation": settings.dilation}
    if not columns:
        kernel = magnitudes.sum(2, keepdim=True).flatten(0, 1)
        ones = magnitudes.new_ones(1, 1, *sizes)
        ones = functional.pad(ones, flat, value=1.0 if settings.circular else 0.0)
        rows: Tensor = getattr(functional, f"conv{axes}d")(ones, kernel, **strides)
        return rows.reshape(count, -1).amax(1)
    blocks = magnitudes.reshape(count, groups, -1, *magnitudes.shape[2:]).sum(2)
    kernel = blocks.reshape(1, -1, *magnitudes.shape[3:])  # (1, kernels x channels in, ...)
    padded = [size + sum(pair) for size, pair in zip(sizes, sides, strict=True)]
    counts = [
        (size - step * (length - 1) - 1) // stride + 1
        for size, length, stride, step in zip(
            padded, magnitudes.shape[3:], settings.stride, settings.dilation, strict=True
        )
    ]
    ones = magnitudes.new_ones(1, 1, *counts)
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
    found = sums.reshape(count, -1) if sums.numel() else sums.new_zeros(count, 1)
    return found.amax(1)

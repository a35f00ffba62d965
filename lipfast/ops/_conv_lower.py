"""A proved lower bound of a convolution's norm at its true input size, from any vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops.scaling import unscaled_down
from lipfast.rounding import UNIT_ROUNDOFF, WIDE, wide_gamma


def certified_lower(
    conv: ConvOperator, weight: Tensor, exponent: int, vector: Tensor, memory: int
) -> tuple[float, Tensor]:
    r"""Proved lower bound of the operator's norm from any vector x, and the image's direction.

    $\frac{\|y\| (1 - \gamma_{n+4}) - \gamma_{kc+2} \|P\| \phi \|x\|}{\|x\| (1 + \gamma_{m+4})}$
    with y = fl(A x), k taps, c channels per group, $\|P\| \phi$ a bound of the norm of the map with
    the magnitudes of all taps.

    Args:
        conv: A.
        weight: that of A times 2^-`exponent`, exactly, float64 (`scaling.scaled`).
        exponent: of the scaling.
        vector: x, (C_in, *input_size), float64.
        memory: bytes for what the taps read.

    Returns:
        The bound, and y / ||y|| as (C_out, *output_size), zero if y is.
    """
    y = conv.exact_taps_image(vector, weight, memory)
    shape = (conv.channels[0], *conv.output_size)
    grouped = _summed_magnitudes(conv, weight)
    norms = [(vector * vector).sum().sqrt(), (y * y).sum().sqrt()]
    sums = [grouped.sum(2).max(), grouped.sum(1).max()]
    sizes = torch.stack(norms + sums).tolist()  # one wait for a device
    value = lower_of_sizes(conv, sizes, exponent)
    if value is None:
        return 0.0, y.zero_().reshape(shape)
    return value, (y / sizes[1]).reshape(shape)


def sizes_of_many(
    conv: ConvOperator, weights: Tensor, vectors: Tensor, memory: int
) -> tuple[Tensor, Tensor]:
    """What `lower_of_sizes` asks for of each of N operators, (N, 4), and the images (N, ...).

    Args:
        conv: all of them, side by side: groups of channels of one operator.
        weights: theirs, scaled, (N, *kernel), float64.
        vectors: (N, C_in, *input_size), float64.
        memory: bytes for what the taps read.
    """
    count = len(weights)
    y = conv.exact_taps_image(vectors.flatten(0, 1), weights.flatten(0, 1), memory)
    images = y.reshape(count, -1, *conv.output_size)
    grouped = _summed_magnitudes(conv, weights.flatten(0, 1))
    grouped = grouped.reshape(count, -1, *grouped.shape[1:])
    norms = [own.square().flatten(1).sum(1).sqrt() for own in (vectors, images)]
    sums = [grouped.sum(side).flatten(1).amax(1) for side in (3, 2)]
    return torch.stack([*norms, *sums], 1), images


def _summed_magnitudes(conv: ConvOperator, weight: Tensor) -> Tensor:
    """P = sum_k |W_k| of every group: (groups, out, in)."""
    magnitudes = weight.abs().flatten(2).sum(2)
    return magnitudes.reshape(conv.groups, -1, magnitudes.shape[1])


def lower_of_sizes(conv: ConvOperator, sizes: Sequence[float], exponent: int) -> float | None:
    """The bound of `certified_lower`; None where the image or the vector is too small for one.

    Args:
        conv: one operator A.
        sizes: of x and of y = fl(A x), and the largest row and column sums of all taps' magnitudes.
        exponent: of the scaling.
    """
    size, image, rows, columns = sizes
    if not (size > 1e-100 and image > 1e-100):
        return None
    factor, _ = conv.padding_factor()
    most = math.sqrt(rows * columns) * factor * WIDE
    terms = conv.weight[0].numel()
    own = wide_gamma(conv.channels[0] * math.prod(conv.output_size) + 4)
    error = wide_gamma(terms + 2) * most * size
    numerator = image * (1 - own) - error - 2.0**-900
    entries = conv.channels[1] * math.prod(conv.input_size)
    denominator = size * (1 + wide_gamma(entries + 4))
    value = numerator / denominator * (1 - 8 * UNIT_ROUNDOFF)
    return unscaled_down(max(value, 0.0), exponent)

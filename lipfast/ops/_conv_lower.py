"""A proved lower bound of a convolution's norm at its true input size, from any vector."""

from __future__ import annotations

import math

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
    magnitudes = weight.abs().flatten(2).sum(2)
    grouped = magnitudes.reshape(conv.groups, -1, magnitudes.shape[1])
    norms = [(vector * vector).sum().sqrt(), (y * y).sum().sqrt()]
    sums = [grouped.sum(2).max(), grouped.sum(1).max()]
    size, image, rows, columns = torch.stack(norms + sums).tolist()  # one wait for a device
    if not (size > 1e-100 and image > 1e-100):
        return 0.0, y.zero_().reshape(shape)
    factor, _ = conv.padding_factor()
    most = math.sqrt(rows * columns) * factor * WIDE
    terms = weight[0].numel()
    own, error = wide_gamma(y.numel() + 4), wide_gamma(terms + 2) * most * size
    numerator = image * (1 - own) - error - 2.0**-900
    denominator = size * (1 + wide_gamma(vector.numel() + 4))
    value = numerator / denominator * (1 - 8 * UNIT_ROUNDOFF)
    return unscaled_down(max(value, 0.0), exponent), (y / image).reshape(shape)

"""Gram matrices of symbols of convolutions, many frequencies at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, check_same_device
from lipfast.ops.tap_products import tap_differences


class Frequencies(NamedTuple):
    r"""Which symbols, and where: $\theta$ is $2 \pi$ times centres over periods.

    Attributes:
        symbols: (count,), int64.
        centres: (count, 3), int64.
        periods: three positive numbers, at most 2^40.
    """

    symbols: Tensor
    centres: Tensor
    periods: Sequence[int]


def symbol_grams(products: Tensor, axes: Sequence[int], at: Frequencies, shifts: Tensor) -> Tensor:
    r"""$t_i I - G(\theta_i)$ for the Gram matrices G of symbols, at many frequencies.

    $G(\theta) = R_0 + \sum_{j > 0} (e^{i j \theta} R_j + e^{-i j \theta} R_j^T)$. Beside the errors
    of the products R, the real and the imaginary part of every entry of G are plain sums of at most
    2 J terms in float64, of phases within 64 u; t is added with one more rounding.

    Args:
        products: R, (symbols, J, n, n), float64: what `tap_products` returns.
        axes: taps per axis: three numbers.
        at: which of the products, and the frequencies.
        shifts: t, (count,), float64.

    Returns:
        (count, n, n), complex128, Hermitian.

    Raises:
        ArgumentError: wrong types, dtypes, shapes or devices. Whether symbols are in range is not
            looked at.

    Example:
        >>> import torch
        >>> from lipfast.ops.symbol_grams import Frequencies, symbol_grams
        >>> products = torch.tensor([13.0, 6.0], dtype=torch.float64).reshape(1, 2, 1, 1)
        >>> at = Frequencies(torch.tensor([0]), torch.tensor([[1, 0, 0]]), (2, 1, 1))
        >>> shifts = torch.tensor([40.0], dtype=torch.float64)
        >>> symbol_grams(products, (2, 1, 1), at, shifts).real.flatten()
        tensor([39.], dtype=torch.float64)
    """
    for name, tensor, dimensions in (("products", products, 4), ("shifts", shifts, 1)):
        if check_floating(tensor, name, dimensions).dtype != torch.float64:
            raise ArgumentError(f"{name}: expected float64, got {tensor.dtype}")
    count, n = len(shifts), products.shape[3]
    shape = (len(tap_differences(axes)), n, n) if len(axes) == 3 else ()
    if n == 0 or products.shape[1:] != shape:
        raise ArgumentError(
            f"products: expected (symbols, *{shape}) for axes {tuple(axes)}, got "
            f"{tuple(products.shape)}"
        )
    symbols, centres, periods = at
    for name, tensor, expected in (
        ("symbols", symbols, (count,)),
        ("centres", centres, (count, 3)),
    ):
        if tensor.dtype != torch.int64 or tensor.shape != expected:
            raise ArgumentError(
                f"{name}: expected int64 of shape {expected}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in (("symbols", symbols), ("centres", centres), ("shifts", shifts)):
        check_same_device(tensor, products, name)
    if len(periods) != 3 or not all(0 < period <= 2**40 for period in periods):
        raise ArgumentError(f"periods: expected three numbers up to 2^40, got {tuple(periods)}")
    parts = [tensor.detach().contiguous() for tensor in (products, symbols, centres, shifts)]
    pairs: Tensor = torch.ops.lipfast.symbol_grams(
        parts[0], list(axes), parts[1], parts[2], list(periods), parts[3]
    )
    return torch.view_as_complex(pairs)


@torch.library.register_fake("lipfast::symbol_grams")
def _symbol_grams_fake(products: Tensor, axes: object, symbols: Tensor, *_: object) -> Tensor:
    return products.new_empty((*symbols.shape, *products.shape[2:], 2))


@torch.library.impl("lipfast::symbol_grams", "CPU")
def _symbol_grams_cpu(
    products: Tensor, axes: Sequence[int], symbols: Tensor, *given: Any
) -> Tensor:
    """What the kernel for CUDA does; the CPU's own search has another (conv_grams.h)."""
    centres, periods, shifts = given
    differences = torch.tensor(tap_differences(axes)[1:], dtype=torch.int64).reshape(-1, 3)
    sizes = torch.tensor(list(periods))
    turns = (centres[:, None] * differences % sizes / sizes.double()).sum(-1)
    angles = 2 * math.pi * (turns - turns.round())
    chosen = products[symbols]
    pairs = []
    for phases, sign in ((angles.cos(), 1), (angles.sin(), -1)):
        weighted = torch.einsum("cj,cjnm->cnm", phases, chosen[:, 1:])
        pairs.append(weighted + sign * weighted.mT)
    below = chosen[:, 0].tril()
    real = -(pairs[0] + below + below.tril(-1).mT)
    real.diagonal(dim1=1, dim2=2).add_(shifts[:, None])
    return torch.stack([real, -pairs[1]], -1)

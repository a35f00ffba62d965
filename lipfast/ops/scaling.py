"""Powers of two that keep squares from overflowing, and the way back: exact, or rounded outward."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

# Below, the numbers of 2^e x are so far apart that ldexp rounds.
_DENORMAL = 2.0**-1021
_BIAS, _FRACTION_BITS = 1023, 52


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^e in float64, exactly, for integers -1023 < e < 1024, without a library's power function.

    Example:
        >>> import torch
        >>> powers_of_two(torch.tensor([-1, 0, 3])).tolist()
        [0.5, 1.0, 8.0]
    """
    return ((exponents.long() + _BIAS) << _FRACTION_BITS).view(torch.float64)


def scaled(tensors: Tensor) -> tuple[Tensor, list[int]]:
    """(n, ...) in float64, each times a 2^-e that puts its largest magnitude into [1/2, 1); and e.

    Example:
        >>> import torch
        >>> scaled(torch.tensor([[3.0, 5.0], [0.0, -0.25]]))
        (tensor([[ 0.3750,  0.6250],
                [ 0.0000, -0.5000]], dtype=torch.float64), [3, -1])
    """
    result = tensors.detach().double()
    exponents = [math.frexp(top)[1] for top in result.abs().flatten(1).amax(1).tolist()]
    # In two exact steps: no single power of two holds every exponent.
    for steps in ([-(e // 2) for e in exponents], [e // 2 - e for e in exponents]):
        factors = torch.tensor(
            [math.ldexp(1.0, step) for step in steps], dtype=result.dtype, device=result.device
        )
        result = result * factors.reshape(-1, *[1] * (result.dim() - 1))
    return result, exponents


def unscaled_up(value: float, exponent: int) -> float:
    """At least 2^e value, for a value >= 0."""
    try:
        product = math.ldexp(value, exponent)
    except OverflowError:
        return math.inf
    return math.nextafter(product, math.inf) if product < _DENORMAL else product


def multiplied_up(values: Tensor, powers: Tensor) -> Tensor:
    """At least the products of values >= 0 with powers of two, entry by entry."""
    products = values * powers
    above = torch.nextafter(products, products.new_full((), math.inf))
    return torch.where(products < _DENORMAL, above, products)


def unscaled_down(value: float, exponent: int) -> float:
    """At most 2^e value, for a value >= 0."""
    try:
        product = math.ldexp(value, exponent)
    except OverflowError:
        return sys.float_info.max
    return math.nextafter(product, 0.0) if 0 < product < _DENORMAL else product

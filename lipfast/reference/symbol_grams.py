"""Gram matrices of symbols of convolutions, through the symbols themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def symbol_grams(
    taps: Tensor,
    axes: Sequence[int],
    at: tuple[Tensor, Tensor, Sequence[int]],
    shifts: Tensor,
) -> Tensor:
    r"""$t_i I - \hat W(\theta_i) \hat W(\theta_i)^*$, (count, n, n), complex128.

    Args:
        taps: $W_k$, (symbols, taps, n, m), the last axis of places fastest.
        axes: taps per axis.
        at: which of them (count,), centres (count, axes), and periods, one per axis: theta is 2 pi
            times centres over periods.
        shifts: t, (count,).

    Example:
        >>> taps = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1)
        >>> at = torch.tensor([0]), torch.tensor([[1]]), (4,)
        >>> found = symbol_grams(taps, (2,), at, torch.tensor([30.0]))
        >>> found.real.round().flatten()
        tensor([17.], dtype=torch.float64)
    """
    symbols, centres, periods = at
    places = torch.tensor(list(itertools.product(*map(range, axes))))
    frequencies = centres.double() / torch.tensor(periods, dtype=torch.float64)
    phases = torch.exp(2j * math.pi * (places * frequencies[:, None]).sum(-1))
    hat = torch.einsum("ct,ctnm->cnm", phases, taps[symbols].to(torch.complex128))
    identity = torch.eye(hat.shape[1], dtype=torch.complex128)
    return shifts[:, None, None] * identity - hat @ hat.mH

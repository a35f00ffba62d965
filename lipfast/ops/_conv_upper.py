"""Proved upper bounds of convolutions: of their symbols, of kernels nearby, at the true size.

With S the supremum of the symbol's norm over all frequencies; docs/bounds.md has the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lipfast.ops._conv_bracket import Budget, NativeBracket
from lipfast.ops._conv_device import device_brackets
from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._keyed import CHOLESKY, UPPER_METHODS
from lipfast.ops.spectral_norms import SpectralNorms, spectral_norms
from lipfast.rounding import UNIT_ROUNDOFF, widened

# Circulants of up to so many frequencies are maximised exactly, not over all sizes.
_GRID_POINTS = 1024
# Relative gap of a bound that is loose by more for other reasons.
_LOOSE = 0.1


class SymbolProof:
    """Taps whose symbol was bounded by branch and bound: true of them, wherever it is used.

    Made by `conv_norms` only. A bound of taps that were changed in place since is not used.
    """

    def __init__(self, taps: Tensor, bound: float) -> None:
        self._taps, self._bound, self._version = taps, bound, taps._version

    def bound_of(self, shape: Sequence[int]) -> tuple[Tensor, float] | None:
        """The taps and their bound; None if they have another shape, or were changed."""
        same = tuple(self._taps.shape) == tuple(shape) and self._taps._version == self._version
        return (self._taps, self._bound) if same else None


def proof_of(taps: Tensor, weight: Tensor, bound: float) -> SymbolProof:
    """The proof of taps that were made of a parameter, which an optimizer may change.

    They are copied where they share its memory. Inference tensors do not count their changes, so
    they are copied as well.
    """
    shared = taps.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return SymbolProof(taps.clone() if shared or taps.is_inference() else taps, bound)


def native_brackets(
    taps: Sequence[Tensor],
    budget: Budget,
    starts: Sequence[Tensor | None] | None = None,
    grid: Sequence[int] | None = None,
) -> list[NativeBracket]:
    """Brackets of S, or of the maximum over a grid of three axes' frequencies per kernel."""
    if not taps:
        return []
    starts, grid = starts or [None] * len(taps), grid or [0] * 3 * len(taps)
    if not taps[0].is_cpu:
        return device_brackets(taps, budget, starts, grid)
    empty = torch.empty(0, dtype=torch.float64, device="cpu")
    *values, left, right = torch.ops.lipfast.conv_norms(
        taps,
        [empty if start is None else start for start in starts],
        grid,
        budget.rtol,
        budget.max_cells,
        budget.seed,
        budget.memory,
    )
    lower, upper, frequency, group, cells, codes = values
    # The op is never asked for no bound, and its codes begin with a Cholesky factorisation.
    methods = UPPER_METHODS[CHOLESKY:]
    columns = zip(
        lower.tolist(),
        upper.tolist(),
        frequency.unbind(),
        group.tolist(),
        cells.tolist(),
        [methods[code] for code in codes.tolist()],
        left.split([2 * tensor.shape[4] for tensor in taps]),
        right.split([2 * tensor.shape[5] for tensor in taps]),
        strict=True,
    )
    return [NativeBracket(*column) for column in columns]


def bound_nearby(known: float, change: float) -> float:
    r"""$S(W') \le S(W) + S(W' - W)$, from bounds of both and the difference as it was computed."""
    # The inner factor covers the rounding of the difference, the outer one that of the sum.
    return widened(known + change * (1 + 2.0**-30), 4)


def bounds_side_by_side(differences: Sequence[Tensor], budget: Budget) -> list[tuple[float, int]]:
    r"""$S(D) \le \sqrt T \|(D_1 \dots D_T)\|$, and no cells.

    The symbol is the matrix with all taps side by side times one with a phase per tap, whose norm
    is $\sqrt T$.
    """
    if not differences:
        return []
    flat = [tensor.permute(0, 4, 1, 2, 3, 5).flatten(2) for tensor in differences]
    norms: SpectralNorms[Any] = spectral_norms(
        [matrix for tensor in flat for matrix in tensor],
        rtol=max(_LOOSE, budget.rtol),
        seed=budget.seed,
        memory=budget.memory,
    )
    largest = [float(part.max()) for part in norms.upper.split([len(tensor) for tensor in flat])]
    counts = [tensor[0, ..., 0, 0].numel() for tensor in differences]
    return [
        (widened(value * math.sqrt(count), 4), 0)
        for value, count in zip(largest, counts, strict=True)
    ]


def coarse_bounds(differences: Sequence[Tensor], budget: Budget) -> list[tuple[float, int]]:
    """S of the differences to a factor of two, and the cells it took."""
    found = native_brackets(differences, budget._replace(rtol=0.5))
    return [(bracket.upper, bracket.cells) for bracket in found]


def bound_at_true_size(supremum: float, conv: ConvOperator, budget: Budget) -> float:
    """A bound of S times what padding may add, or a circulant's own norm."""
    factor, covered = conv.padding_factor()
    if factor > 1:
        bound = math.nextafter(supremum * factor, math.inf)
        if covered:
            (unstrided,) = native_brackets([conv.taps(strided=False)], budget)
            bound = min(bound, unstrided.upper)
        return bound
    periods = circulant_periods(conv)
    if periods is not None:
        wrapped = wrapped_taps(conv, periods)
        grid = grid_of(wrapped, periods)
        (circulant,) = native_brackets([wrapped.taps()], budget, grid=grid)
        if wrapped is conv:
            return min(supremum, circulant.upper)
        size = float(conv.weight.detach().to(torch.float64).abs().sum())
        return min(supremum, with_wrapping_error(circulant.upper, conv, size))
    return supremum


def circulant_periods(conv: ConvOperator) -> list[int] | None:
    """How many places a circulant's taps have per axis, where its own norm can be searched for."""
    if conv.mode != "circular" or set(conv.stride) != {1} or max(conv.kernel_size) == 1:
        return None
    periods = _periods(conv)
    return periods if math.prod(periods) <= _GRID_POINTS else None


def grid_of(conv: ConvOperator, periods: Sequence[int]) -> list[int]:
    """The frequencies' numbers on three axes, in the order of `conv.taps()`."""
    return [periods[axis] for axis in conv.tap_axes()] + [1] * (3 - conv.axes)


def _periods(conv: ConvOperator) -> list[int]:
    """How many places the taps of a circulant have per axis, 1 where there is one tap."""
    sizes = zip(conv.kernel_size, conv.input_size, conv.dilation, strict=True)
    return [size // math.gcd(size, step) if taps > 1 else 1 for taps, size, step in sizes]


def wrapped_taps(conv: ConvOperator, periods: Sequence[int]) -> ConvOperator:
    """A circulant by taps that do not meet: itself, or in float64 with a rounding.

    Tap t reads from place t modulo the period. Taps that meet may cancel; the symbol of others is
    as large as they are on some of the grid's frequencies (Parseval).
    """
    weight = conv.weight.detach()
    if all(taps <= period for taps, period in zip(conv.kernel_size, periods, strict=True)):
        return conv
    weight = weight.to(torch.float64)
    for axis, (taps, period) in enumerate(zip(conv.kernel_size, periods, strict=True), start=2):
        if taps > period:
            shape = (*weight.shape[:axis], period, *weight.shape[axis + 1 :])
            places = torch.arange(taps, device=weight.device) % period
            weight = weight.new_zeros(shape).index_add_(axis, places, weight)
    return replace(conv, weight=weight)


def with_wrapping_error(bound: float, conv: ConvOperator, size: float) -> float:
    """A bound of a circulant from one of its `wrapped_taps`.

    The sums' errors are coefficients of permutations, and all their entries together at most n u
    times the taps' (no rounding of a sum is an underflow).

    Args:
        bound: of the wrapped taps.
        conv: the circulant.
        size: the computed sum of all magnitudes of its entries.
    """
    size = size * (1 + 2.0**-20)  # with its own rounding
    rounding = math.nextafter(math.prod(conv.kernel_size) * UNIT_ROUNDOFF * size, math.inf)
    return widened(bound + rounding, 2)

"""Brackets of the norms of one convolution of many networks, on a device that nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lipfast.ops._conv_cells import cells_of
from lipfast.ops._conv_device import products_fit, symbol_fits
from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._conv_queued import QueuedSuprema, fits_again
from lipfast.ops._conv_queued_lower import QueuedLower
from lipfast.ops._conv_search import ConvStart
from lipfast.ops._conv_upper import (
    SymbolProof,
    circulant_periods,
    grid_of,
    with_wrapping_error,
    wrapped_taps,
)
from lipfast.ops._keyed import CHOLESKY, UPPER_METHODS
from lipfast.ops.denormals import denormals_flushed
from lipfast.ops.fetched import Fetched


@dataclass(frozen=True)
class ConvNorm:
    """A bracket of one convolution's norm, as in `ConvNorms`.

    Attributes:
        lower: of the convolution at its input size.
        upper: alike.
        certified: whether both are proved.
        method: how `upper` was proved.
        passes: products with the convolution and its adjoint.
        reached: whether the bracket of the symbol's supremum is as narrow as was asked for.
        start: what a later call may start from.
    """

    lower: float
    upper: float
    certified: bool
    method: str
    passes: int
    reached: bool
    start: Callable[[], ConvStart]


class ConvNormsLater:
    """`lipfast.conv_norms` of N kernels with the same options, as far as one look can give it.

    The search over the symbols has a schedule instead of looks at what it finds, so that launches
    do not depend on N while there is memory. For symbols that it does not bound to `rtol`, those
    that are nearly as large at most frequencies, there is a second, longer one (`look_again`); what
    that does not bound needs `conv_norms`: `ConvNorm.reached` says so.

    Args:
        conv: the first of the convolutions; see `takes`.
        weights: (N, *kernel), float32 or float64, finite; on any device.
        rtol: bound on the relative gap of the supremum's bracket.
        seed: of start vectors.
        memory: bytes.
    """

    def __init__(
        self, conv: ConvOperator, weights: Tensor, *, rtol: float, seed: int, memory: int
    ) -> None:
        self._conv, self._count, self._rtol = conv, len(weights), rtol
        self._seed, self._memory = seed, memory
        self._again: tuple[Sequence[int], QueuedSuprema] | None = None
        many = conv.side_by_side(weights)
        search = partial(self._search, rtol=rtol, seed=seed, memory=memory)
        taps = self._apart(many.taps())
        # A later call may start from these, whatever becomes of the weights until then.
        shared = taps.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
        self._taps = taps.clone() if shared or taps.is_inference() else taps
        self._suprema = search(self._taps, [0, 0, 0])
        self._lower = QueuedLower(conv, weights, self._suprema.peaks, rtol=rtol, memory=memory)
        self._factor, covered = conv.padding_factor()
        self._unstrided = self._circulant = self._sizes = None
        periods = circulant_periods(conv)
        if self._factor > 1 and covered:
            self._unstrided = search(self._apart(many.taps(strided=False)), [0, 0, 0])
        elif self._factor == 1 and periods is not None:
            wrapped = wrapped_taps(many, periods)
            self._circulant = search(self._apart(wrapped.taps()), grid_of(wrapped, periods))
            if wrapped is not many:
                self._sizes = Fetched([weights.double().abs().flatten(1).sum(1)])
        self._certified = not denormals_flushed()

    @staticmethod
    def takes(conv: ConvOperator, memory: int) -> bool:
        """Whether a kernel has several taps and there is room for a symbol."""
        groups, *axes, n, m = conv.taps_shape()
        grid = cells_of(axes, [0, 0, 0])
        fits = products_fit((groups, *axes, n, m), grid, memory) or symbol_fits(n, m, memory)
        return grid.axes > 0 and n > 0 and fits

    def _apart(self, taps: Tensor) -> Tensor:
        return taps.reshape(self._count, -1, *taps.shape[1:])

    @staticmethod
    def _search(
        taps: Tensor, grid: list[int], *, rtol: float, seed: int, memory: int
    ) -> QueuedSuprema:
        return QueuedSuprema(taps, grid, rtol=rtol, seed=seed, memory=memory)

    def look_again(self, kernels: Sequence[int]) -> None:
        """Queue the second schedule for some of the kernels, where there is memory for it."""
        if kernels and fits_again(self._taps.shape[1:], self._rtol, self._memory):
            taps = torch.stack([self._taps[kernel] for kernel in kernels])
            options: dict[str, Any] = {"seed": self._seed, "memory": self._memory, "again": True}
            self._again = kernels, QueuedSuprema(taps, [0, 0, 0], rtol=self._rtol, **options)

    def _brackets(self) -> list[tuple[float, float]]:
        """Brackets of the suprema of the symbols."""
        found = self._suprema.brackets()
        if self._again is not None:
            for kernel, (lower, upper) in zip(
                self._again[0], self._again[1].brackets(), strict=True
            ):
                found[kernel] = max(found[kernel][0], lower), min(found[kernel][1], upper)
        return found

    def norms(self) -> list[ConvNorm]:
        """One for each kernel; waits for the device if nothing has waited since."""
        suprema = self._brackets()
        uppers = self._uppers([upper for _, upper in suprema])
        found = []
        for index, (lower, (below, above), upper) in enumerate(
            zip(self._lower.bounds(), suprema, uppers, strict=True)
        ):
            found.append(
                ConvNorm(
                    lower,
                    upper,
                    self._certified,
                    UPPER_METHODS[CHOLESKY],
                    self._lower.passes,
                    above < math.inf and above - below <= self._rtol * above,
                    partial(self._start, index, above),
                )
            )
        return found

    def _uppers(self, suprema: list[float]) -> list[float]:
        """At the true size: S times what padding adds, or a circulant's own norm."""
        if self._factor > 1:
            suprema = [math.nextafter(upper * self._factor, math.inf) for upper in suprema]
        if self._unstrided is not None:
            others = [upper for _, upper in self._unstrided.brackets()]
        elif self._circulant is not None:
            others = [upper for _, upper in self._circulant.brackets()]
            if self._sizes is not None:
                sizes = self._sizes.read()[0].tolist()
                pairs = zip(others, sizes, strict=True)
                others = [with_wrapping_error(upper, self._conv, size) for upper, size in pairs]
        else:
            return suprema
        return [min(pair) for pair in zip(suprema, others, strict=True)]

    def _start(self, index: int, upper: float) -> ConvStart:
        """What a later call may start from."""
        peaks, lower = self._suprema.peaks, self._lower
        left = torch.view_as_real(peaks.left[index]).T.flatten()
        header = peaks.groups[index].double()[None]
        maximum = torch.cat([header, peaks.frequencies[index], left])
        vectors = [
            own[index] / size.clamp_min(1e-300)
            for own, size in zip((lower.right, lower.images), lower.sizes[index], strict=True)
        ]
        right, image = reversed(vectors) if self._conv.transposed else vectors
        return ConvStart(right, image, maximum, SymbolProof(self._taps[index], upper))

r"""Brackets of the suprema of symbols that nobody waits for: a covering, proved leaf by leaf.

A maximum that is attained in a cell with centre c is at most $\|\hat W(c)\|_2 / \cos D$, D the
cell's largest angle. So S is at most the largest of these over the leaves of any covering of half
of the torus (docs/bounds.md, "Convolutions on CUDA"). Cells, shifts and vectors are choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops._conv_cells import Cells, cells_of
from lipfast.ops._conv_device import kernels_at_once
from lipfast.ops._conv_leaves import AGAIN, ONCE, Exploration, Places, Schedule, cells_looked_at
from lipfast.ops._conv_proofs import prove, prove_grams
from lipfast.ops._conv_spread import spread_at_cells, spread_of_products
from lipfast.ops._conv_symbol_lower import image_sizes, lower_value
from lipfast.ops._conv_symbols import SymbolStack, batches, symbol_stack
from lipfast.ops.fetched import Fetched
from lipfast.ops.scaling import unscaled_down, unscaled_up
from lipfast.rounding import UNIT_ROUNDOFF

# The largest entry of a kernel lies in [1/2, 1), where it is not zero.
_LEAST_BOUND = 2.0**-70


@dataclass(frozen=True)
class SymbolPeaks:
    """Where the symbols of K kernels are largest, as far as was seen; on the device.

    Attributes:
        groups: (K,), of channels.
        frequencies: (K, 3), cycles per tap.
        left: (K, n), complex, singular vectors.
        right: (K, m), complex.
    """

    groups: Tensor
    frequencies: Tensor
    left: Tensor
    right: Tensor

    def some(self, part: slice) -> SymbolPeaks:
        """Those of some kernels."""
        return SymbolPeaks(*(own[part] for own in vars(self).values()))


def _bytes_of_places(shape: Sequence[int], cells: Cells, rtol: float, schedule: Schedule) -> int:
    """For one kernel: a cell's vector, its parent's, and copies of these; and numbers."""
    side = shape[4]
    return 64 * (side + 2) * cells_looked_at(cells, shape[0], side, rtol, schedule)


def fits_again(shape: Sequence[int], rtol: float, memory: int) -> bool:
    """Whether there is room for the second schedule, for taps of one kernel of this shape."""
    cells = cells_of(shape[1:4], [0, 0, 0])
    return _bytes_of_places(shape, cells, rtol, AGAIN) <= memory


class QueuedSuprema:
    """Brackets of S of kernels of one shape, or of the maxima over a grid, on their way.

    Args:
        taps: (K, groups, 3 axes, n, m), n <= m, axes with one tap last.
        grid: three sizes, or zeros: all frequencies.
        rtol: what the bracket should be relative to its upper end. Whether it is must be looked at.
        seed: of start vectors.
        memory: bytes; of one kernel there must be room for its products of taps.
        again: with more cells, each looked at more closely; for kernels of which another call's
            bracket is not narrow enough.

    Attributes:
        peaks: where the symbols are largest.
    """

    def __init__(
        self,
        taps: Tensor,
        grid: Sequence[int],
        *,
        rtol: float,
        seed: int,
        memory: int,
        again: bool = False,
    ) -> None:
        self._cells, self._again = cells_of(taps.shape[2:5], grid), again
        self._rtol, self._seed, self._memory = rtol, seed, memory
        size = kernels_at_once(taps.shape[1:], self._cells, memory)
        each = _bytes_of_places(taps.shape[1:], self._cells, rtol, self._schedule)
        at_once = min(size or len(taps), max(1, memory // each))
        parts = [self._part(taps[part], size > 0) for part in batches(len(taps), at_once)]
        self._shape = len(taps), taps.shape[2:5].numel(), *taps.shape[5:]
        read, peaks = (
            [torch.cat(column) for column in zip(*own, strict=True)]
            for own in zip(*parts, strict=True)
        )
        self._read, self.peaks = Fetched(read), SymbolPeaks(*peaks)

    @property
    def _schedule(self) -> Schedule:
        return AGAIN if self._again else ONCE

    def _part(self, taps: Tensor, with_products: bool) -> tuple[list[Tensor], list[Tensor]]:
        """What is to be read of some kernels, and their peaks."""
        stack = symbol_stack(taps, self._cells.periods, with_products=with_products)
        room = self._memory - stack.bytes_held()
        found = Exploration(
            stack,
            self._cells,
            rtol=self._rtol,
            seed=self._seed,
            memory=room,
            schedule=self._schedule,
        )
        sizes, right = image_sizes(stack, found.best, self._memory)
        read = [self._proved(stack, found, room), sizes, stack.exponents.double(), stack.largest]
        best = found.best
        peaks = [
            best.symbols % taps.shape[1],
            best.centres / stack.periods.double(),
            best.vectors,
            right,
        ]
        return read, peaks

    def _proved(self, stack: SymbolStack, found: Exploration, memory: int) -> Tensor:
        """(K,): S is at most this, infinite where a leaf was not proved."""
        leaves, kernels = found.leaves, len(stack.exponents)
        errors = stack.errors() if stack.products is None else stack.gram_errors()
        # Of smaller values rounding leaves nothing, and of zero no factor.
        least = 4 * (errors if stack.products is None else errors.sqrt())
        least = least.reshape(kernels, -1).amax(1).clamp_min(_LEAST_BOUND)
        room = 1 + self._rtol / 16
        goal = torch.maximum(found.best.values.clamp_min(0).sqrt() * (room / found.cosine), least)
        goal = goal[:, None].expand_as(leaves.values)
        cosines = found.cosines * (1 - 16 * UNIT_ROUNDOFF)
        # At least 2 E sin^2 D: the square of a cosine is rounded, and so is the difference.
        sines = 1 - cosines.square() + 4 * UNIT_ROUNDOFF
        costs = self._spread(stack, errors, memory)[leaves.symbols] * (2 + 2.0**-40) * sines
        own = leaves.values.clamp_min(0).sqrt() * room
        left = (goal.square() - costs).clamp_min(0).sqrt()
        targets = torch.stack([goal * cosines, left, own, least[:, None].expand_as(own)]).amax(0)
        bounds = self._at_centres(stack, errors, leaves, targets, memory)
        if self._again:
            # What Lanczos took for too small a value has at least the largest of all.
            bounds = torch.minimum(bounds, self._at_centres(stack, errors, leaves, goal, memory))
        # Two or three roundings; the cosine is diminished by the product's.
        bounds = torch.minimum(bounds / cosines, (bounds.square() + costs).sqrt())
        return torch.where(leaves.needed, bounds * (1 + 8 * UNIT_ROUNDOFF), 0.0).amax(1)

    def _spread(self, stack: SymbolStack, errors: Tensor, memory: int) -> Tensor:
        """(N,): E of every symbol (`_conv_spread`), infinite where nothing is known of it."""
        if stack.products is None:
            return torch.full_like(errors, math.inf)
        found = spread_of_products(stack, errors)
        if not self._again:
            return found
        closer = spread_at_cells(stack, self._cells, errors, seed=self._seed, memory=memory)
        return torch.minimum(found, closer)

    @staticmethod
    def _at_centres(
        stack: SymbolStack, errors: Tensor, leaves: Places, targets: Tensor, memory: int
    ) -> Tensor:
        r"""Bounds of $\|\hat W(c)\|_2$ at leaves, infinite where nothing was proved."""
        flat = [leaves.symbols.flatten(), leaves.centres.flatten(0, 1), targets.flatten()]
        bounds = []
        for part in batches(len(flat[0]), max(1, memory // stack.bytes_per_symbol())):
            symbols, centres, most = (own[part] for own in flat)
            if stack.products is not None:
                bounds.append(prove_grams(stack, errors, (symbols, centres), most)[0])
                continue
            parts = stack.at(symbols, stack.phases(centres))
            b, own = torch.complex(*parts), errors[symbols]
            # The second one is for the rounding of the sum.
            bounds.append(prove(*parts, torch.bmm(b, b.mH), most - 3 * own) + 2 * own)
        return torch.cat(bounds).reshape(targets.shape)

    def brackets(self) -> list[tuple[float, float]]:
        """Lower and upper ends, one pair for each kernel."""
        upper, sizes, exponents, largest = (values.tolist() for values in self._read.read())
        found = []
        for bound, row, power, most in zip(upper, sizes, exponents, largest, strict=True):
            lower = unscaled_down(lower_value(self._shape, row), int(power))
            # The largest tap entry is a lower bound without rounding: it is a mean of symbols.
            lower = max(lower, 0.0 if self._cells.on_grid else most)
            above = unscaled_up(bound, int(power)) if bound >= 0 else math.inf
            found.append((lower, above if most != 0 else 0.0))
        return found

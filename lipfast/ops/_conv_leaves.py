r"""Cells that cover half of the torus, small where symbols are large: as many as a schedule says.

Nothing here waits for a device, or proves anything. Of every level a fixed number of cells is split
for each kernel, those with the largest symbols at their centres; the others are leaves, and so are
all of the last level. That is a covering whatever was split. How good a bound it gives is said by
the proofs of its leaves (`_conv_queued`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.ops._conv_ascent import Peaks, joined, looked_at, start_vectors
from lipfast.ops._conv_cells import Cells
from lipfast.ops._conv_symbols import SymbolStack, batches
from lipfast.ops.fetched import sent

# Cells that are split, level by level, of all groups of a kernel together: by axes. From the third
# level on times a factor: the largest singular values of larger symbols vary less. More than are
# needed for kernels of Gaussian entries: 26 to 209 on the third level of 3 x 3 taps, from 64 x 128
# to 256 x 256 channels; 1,011 on the second level of 3 x 3 x 3.
_SPLIT = {
    1: (64, 32, 16, 8),
    2: (256, 256, 64, 32, 16),
    3: (256, 1100, 256, 64, 64, 16),
}
_SIDE_OF_ONE, _LARGEST_FACTOR = 64, 5
# Of each level and of the last one, how many cells a maximum is looked for at.
_CANDIDATES = 6
# A child's vector is its parent's, and as much of another that leads out of subspaces.
_NOISE = 1e-2


# In a second schedule, for symbols that are nearly as large at many frequencies as at the best: all
# cells of the first levels.
_SPLIT_AGAIN = {
    1: (256, 256, 128, 64, 32),
    2: (1024, 1024, 1024, 2048, 512, 128, 64),
    3: (1024, 2048, 1024, 256, 64),
}


class Schedule(NamedTuple):
    """What a covering may take.

    Attributes:
        again: whether it is the second one.
        first: steps of Lanczos' process at roots.
        later: at children, from their parents' vectors.
        last: at the places with the largest values.
        squarings: of `top_of_small`, which tell singular values from each other.
    """

    again: bool
    first: int
    later: int
    last: int
    squarings: int

    def most_split(self, cells: Cells, level: int, side: int) -> int:
        """Cells of a level that are split, for each kernel with symbols of this side."""
        count = _of_level(_SPLIT[cells.axes], level)
        if level >= 2:
            count *= min(max(1, side // _SIDE_OF_ONE), _LARGEST_FACTOR)
        return max(count, _of_level(_SPLIT_AGAIN[cells.axes], level)) if self.again else count


def _of_level(counts: Sequence[int], level: int) -> int:
    return counts[min(level, len(counts) - 1)]


ONCE, AGAIN = Schedule(False, 8, 5, 20, 12), Schedule(True, 16, 10, 48, 24)


@dataclass(frozen=True)
class Places:
    """P cells of each kernel, of any of its groups.

    Attributes:
        symbols: (kernels, P), which of the stack.
        centres: (kernels, P, 3), frequencies in units of the cells.
        needed: (kernels, P): whether a cell is part of the covering.
        values: (kernels, P), the Gram matrices' largest eigenvalues at the centres, about; from
            below. Negative where a cell is not needed.
        vectors: (kernels, P, n), complex, theirs.
    """

    symbols: Tensor
    centres: Tensor
    needed: Tensor
    values: Tensor
    vectors: Tensor

    def at(self, places: Tensor) -> Places:
        """Those at (kernels, Q) places."""
        wide = places[:, :, None]
        return Places(
            self.symbols.gather(1, places),
            self.centres.gather(1, wide.expand(-1, -1, 3)),
            self.needed.gather(1, places),
            self.values.gather(1, places),
            self.vectors.gather(1, wide.expand(-1, -1, self.vectors.shape[2])),
        )


def _put_beside(parts: Sequence[Places]) -> Places:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Places(*(torch.cat(column, 1) for column in columns))


class Exploration:
    """A covering, and where symbols are largest as far as was seen.

    Attributes:
        leaves: the covering of half of the torus, for each group; without vectors.
        cosines: (P,), `Cells.cosine` of the leaves' levels.
        cosine: of the last level.
        best: one place for each kernel, in their order.
    """

    def __init__(
        self,
        stack: SymbolStack,
        cells: Cells,
        *,
        rtol: float,
        seed: int,
        memory: int,
        schedule: Schedule = ONCE,
    ) -> None:
        self._stack, self._cells, self._schedule = stack, cells, schedule
        self._batch = max(1, memory // stack.bytes_per_symbol())
        self._start = start_vectors(1, stack.sides[0], seed, stack.taps)
        last = last_level(cells, rtol)
        self.cosine = cells.cosine(last)
        leaves: list[Places] = []
        candidates: list[Places] = []
        cosines: list[Tensor] = []
        current = self._roots()
        for level in range(last + 1):
            order = current.values.argsort(dim=1, descending=True)
            count = order.shape[1]
            most = schedule.most_split(cells, level, stack.sides[0])
            split = min(most, count) if level < last else 0
            if split < count:
                plain = replace(current, vectors=current.vectors[:, :, :0])
                leaves.append(plain.at(order[:, split:]))
                cosines.append(current.values.new_full((count - split,), cells.cosine(level)))
            candidates.append(current.at(order[:, : _CANDIDATES if level == last else 1]))
            if split:
                current = self._children(current.at(order[:, :split]), level)
        self.leaves, self.cosines = _put_beside(leaves), torch.cat(cosines)
        self.best = self._highest(candidates)

    def _roots(self) -> Places:
        roots = sent(self._cells.roots(), self._stack.taps.device)
        kernels, count = len(self._stack.exponents), len(self._stack.taps)
        symbols = torch.arange(count, device=roots.device)[:, None].expand(-1, len(roots))
        symbols = symbols.reshape(kernels, -1)
        centres = roots.repeat(count, 1).reshape(kernels, -1, 3)
        vectors = self._start.expand(*symbols.shape, -1)
        return self._looked_at(
            symbols, centres, torch.ones_like(symbols).bool(), vectors, steps=self._schedule.first
        )

    def _children(self, parents: Places, level: int) -> Places:
        kernels = len(parents.symbols)
        centres, needed = self._cells.all_children(parents.centres.flatten(0, 1), level)
        each = centres.shape[1]
        needed = needed.reshape(kernels, -1, each) & parents.needed[:, :, None]
        noise = self._start * (_NOISE / self._start.norm())
        vectors = (parents.vectors + noise)[:, :, None].expand(-1, -1, each, -1)
        return self._looked_at(
            parents.symbols[:, :, None].expand(-1, -1, each).flatten(1),
            centres.reshape(kernels, -1, 3),
            needed.flatten(1),
            vectors.flatten(1, 2),
            steps=self._schedule.later,
        )

    def _looked_at(
        self, symbols: Tensor, centres: Tensor, needed: Tensor, vectors: Tensor, *, steps: int
    ) -> Places:
        flat = Peaks(
            symbols.new_empty(symbols.numel(), dtype=torch.float64),
            symbols.flatten(),
            centres.flatten(0, 1),
            vectors.flatten(0, 1),
        )
        squarings = self._schedule.squarings
        peaks = joined(
            [
                looked_at(
                    self._stack, at.symbols, at.centres, at.vectors, steps, squarings=squarings
                )
                for part in batches(symbols.numel(), self._batch)
                for at in [flat[part]]
            ]
        )
        values = peaks.values.reshape(symbols.shape)
        # What is not part of the covering is split last.
        values = torch.where(needed, values, -1.0)
        return Places(symbols, centres, needed, values, peaks.vectors.reshape(*vectors.shape))

    def _highest(self, candidates: Sequence[Places]) -> Peaks:
        """The largest symbol of each kernel, looked at more closely."""
        some = _put_beside(candidates)
        some = some.at(some.values.argsort(dim=1, descending=True)[:, :_CANDIDATES])
        found = self._looked_at(
            some.symbols, some.centres, some.needed, some.vectors, steps=self._schedule.last
        )
        best = found.at(found.values.argmax(dim=1, keepdim=True))
        return Peaks(best.values[:, 0], best.symbols[:, 0], best.centres[:, 0], best.vectors[:, 0])


def last_level(cells: Cells, rtol: float) -> int:
    """The first level that costs no more than a quarter of `rtol`; 0 where nothing is split."""
    level = 0
    while cells.splits(level) and cells.cosine(level) * (1 + 0.25 * rtol) < 1:
        level += 1
    return level


def cells_looked_at(
    cells: Cells, groups: int, side: int, rtol: float, schedule: Schedule = ONCE
) -> int:
    """How many an `Exploration` looks at for each kernel, with symbols of this side."""
    count = groups * len(cells.roots())
    total, last = count, last_level(cells, rtol)
    for level in range(last):
        count = min(schedule.most_split(cells, level, side), count) * cells.children_of_one
        total += count
    return total

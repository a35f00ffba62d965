"""Where symbols of convolutions are large: an ascent over frequencies and vectors. Proves nothing.

Many candidates go up together, on the device of the taps, each with a fixed number of steps, so
that nothing waits for the device but small eigenvalue problems.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops._conv_cells import Cells
from lipfast.ops._conv_symbols import SymbolStack, batches, top_vectors
from lipfast.ops.fetched import sent

# Rounds from a survey, and from a place that is near a peak already.
ROUNDS, FEW_ROUNDS = 6, 2
_STEPS_TRIED = 9
_BASIS_SIZE = 12


@dataclass(frozen=True)
class Peaks:
    """C places with large symbols.

    Attributes:
        values: (C,), the Gram matrices' largest eigenvalues, about; from below.
        symbols: (C,), which of the stack.
        centres: (C, 3), frequencies in units of the cells.
        vectors: (C, n), complex, left singular vectors.
    """

    values: Tensor
    symbols: Tensor
    centres: Tensor
    vectors: Tensor

    def __getitem__(self, index: Tensor | slice) -> Peaks:
        return Peaks(*(part[index] for part in self._parts()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.symbols, self.centres, self.vectors

    def better_of(self, other: Peaks) -> Peaks:
        """The higher of two, one by one."""
        higher = other.values > self.values
        pairs = zip(self._parts(), other._parts(), strict=True)
        return Peaks(
            *(
                torch.where(higher.reshape(-1, *[1] * (mine.dim() - 1)), its, mine)
                for mine, its in pairs
            )
        )


def joined(peaks: list[Peaks]) -> Peaks:
    """All of them, one after another."""
    return Peaks(*(torch.cat(parts) for parts in zip(*(p._parts() for p in peaks), strict=True)))


def looked_at(
    stack: SymbolStack,
    symbols: Tensor,
    centres: Tensor,
    start: Tensor,
    steps: int,
    *,
    squarings: int = 12,
) -> Peaks:
    """The top of the Gram matrices at given frequencies, from given vectors (C, n)."""
    values, vectors = top_vectors(stack.grams(symbols, centres), start, steps, squarings)
    return Peaks(values, symbols, centres, vectors)


def ascended(
    stack: SymbolStack, cells: Cells, peaks: Peaks, memory: int, rounds: int = ROUNDS
) -> Peaks:
    """Alternates between the best frequency for a vector and the top vector there."""
    size = 2 * stack.bytes_per_symbol() + 24 * stack.taps[0].numel()
    parts = batches(len(peaks.values), max(1, memory // size))
    return joined([_ascended(stack, cells, peaks[part], rounds) for part in parts])


def _ascended(stack: SymbolStack, cells: Cells, peaks: Peaks, rounds: int) -> Peaks:
    for _ in range(0 if cells.on_grid or cells.axes == 0 else rounds):
        moves = _best_moves(stack, cells, peaks)
        # With the vector held fixed the frequency moves too little: twice as far is tried, too.
        centres = torch.cat([peaks.centres + moves, peaks.centres + 2 * moves]) % stack.periods
        again = torch.cat([peaks.symbols] * 2), centres, torch.cat([peaks.vectors] * 2)
        tried = looked_at(stack, *again, _BASIS_SIZE)
        count = len(moves)
        peaks = peaks.better_of(tried[:count]).better_of(tried[count:])
    for _ in range(3 if cells.on_grid else 1):
        at = peaks.symbols, peaks.centres, peaks.vectors
        peaks = peaks.better_of(looked_at(stack, *at, 2 * _BASIS_SIZE))
    return peaks


def _best_moves(stack: SymbolStack, cells: Cells, peaks: Peaks) -> Tensor:
    r"""(C, 3): from where a peak is to the largest $\|\hat W(\theta)^* x\|$ nearby, x its vector.

    That is a trigonometric polynomial whose coefficients are products of the $W_k^T x$: a search
    over ever smaller neighbourhoods.
    """
    taps = stack.taps[peaks.symbols]
    a = torch.complex(
        *(torch.einsum("ctnm,cn->ctm", taps, x) for x in (peaks.vectors.real, peaks.vectors.imag))
    )
    products = torch.bmm(a, a.mH)
    device = taps.device
    ranges = [(-2, -1, 0, 1, 2) if axis < cells.axes else (0,) for axis in range(3)]
    pattern = torch.tensor(list(itertools.product(*ranges)), device=device)
    widths = torch.tensor(cells.widths(), dtype=torch.float64, device=device)
    steps = (widths * stack.periods).mul(0.25)
    shrinks = 0.35 ** torch.arange(_STEPS_TRIED, dtype=torch.float64, device=device)
    tried = pattern * (steps * shrinks[:, None, None]).round().long()
    # e^{-i k.theta} at the centres, and of all that is added to them: a sum's is their product.
    at = _waves(stack, peaks.centres)
    turns = _waves(stack, tried.reshape(-1, 3)).reshape(_STEPS_TRIED, len(pattern), -1)
    moves = torch.zeros_like(peaks.centres)
    for shrink in range(_STEPS_TRIED):
        z = at[:, None] * turns[shrink]
        values = (torch.bmm(z, products) * z.conj()).real.sum(-1)
        best = values.argmax(1)
        moves = moves + tried[shrink].index_select(0, best)
        at = at * turns[shrink].index_select(0, best)
    return moves


def _waves(stack: SymbolStack, places: Tensor) -> Tensor:
    cosines, sines = stack.phases(places)
    return torch.complex(cosines, -sines)


def start_vectors(count: int, n: int, seed: int, like: Tensor) -> Tensor:
    """(count, n), complex, all the same seeded vector."""
    generator = torch.Generator(device="cpu").manual_seed(seed % 2**63)
    vector = torch.randn(2, n, generator=generator, dtype=torch.float64, device="cpu")
    vector = sent(vector, like.device).to(like.dtype)
    return torch.complex(vector[0], vector[1]).expand(count, n)

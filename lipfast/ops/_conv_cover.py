r"""Proved upper bounds of the suprema of many symbols, by branch and bound on the taps' device.

A cell leaves only when it is excluded, by a proof at its centre, or for its children, which cover
it; `tau` never falls. So once no cell of a kernel is left its S is at most its tau, whatever the
choices were. Cells of one level are tested together, those of all kernels and groups.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops._conv_ascent import (
    FEW_ROUNDS,
    ROUNDS,
    Peaks,
    ascended,
    joined,
    looked_at,
    start_vectors,
)
from lipfast.ops._conv_bracket import Budget
from lipfast.ops._conv_cells import Cells
from lipfast.ops._conv_proofs import prove, prove_grams
from lipfast.ops._conv_symbols import SymbolStack, batches, top_vectors
from lipfast.rounding import UNIT_ROUNDOFF

# Steps of the search for a larger value at a cell that was not excluded.
_LOOK_STEPS = 8
# Of the candidates of each kernel, how many are ascended from.
_SURVEYED = 4
# The largest entry of a kernel lies in [1/2, 1), where it is not zero.
_LEAST_TAU = 2.0**-70


@dataclass(frozen=True)
class _Open:
    """Cells that are not excluded yet: which symbol's, and centres (P, 3)."""

    symbols: Tensor
    centres: Tensor

    def __getitem__(self, index: Tensor) -> _Open:
        return _Open(self.symbols[index], self.centres[index])


class Cover:
    """The search over the cells of a stack of symbols.

    Attributes:
        best: the largest value found, one per kernel.
        tau: what S is at most once nothing is open: (kernels,), on the CPU.
        tested: cells that were factored, per kernel.
    """

    def __init__(
        self, stack: SymbolStack, cells: Cells, budget: Budget, known: Peaks | None
    ) -> None:
        self._stack, self._cells, self._budget = stack, cells, budget
        self._kernels = len(stack.exponents)
        # What is proved is proved of symbols, or of squares.
        self._errors = stack.errors() if stack.products is None else stack.gram_errors()
        self._memory = budget.memory - stack.bytes_held()
        self._batch = max(1, self._memory // stack.bytes_per_symbol())
        self._owners = stack.owners.tolist()
        # Of smaller values rounding leaves nothing, and of zero no factor.
        errors = torch.zeros(self._kernels, dtype=torch.float64, device=stack.taps.device)
        errors = errors.scatter_reduce(0, stack.owners, self._errors, "amax")
        errors = errors if stack.products is None else errors.sqrt()
        self.tau = [max(4 * value, _LEAST_TAU) for value in errors.tolist()]
        self.tested = [0] * self._kernels
        self.best = self._surveyed() if known is None else self._ascended(known)
        self._raise_to_best()

    def run(self) -> None:
        """Tests and splits until nothing is open."""
        open_, level = self._roots(), 0
        while len(open_.symbols):
            left, peaks = self._tested(open_, level)
            owners = self._owners_of(left)
            self._note(peaks, owners)
            stays = self._stays(owners, level)
            if any(stays):
                index = torch.tensor(stays, device=left.symbols.device)
                self._cover_at_last(left[index], peaks[index], level)
                left = left[~index]
            if len(left.symbols):
                centres, parents = self._cells.children(left.centres, level)
                left = _Open(left.symbols[parents], centres)
            open_, level = left, level + 1

    def _owners_of(self, cells: _Open) -> list[int]:
        return [self._owners[symbol] for symbol in cells.symbols.tolist()]

    def _roots(self) -> _Open:
        roots = self._cells.roots().to(self._stack.taps.device)
        count = len(self._stack.taps)
        symbols = torch.arange(count, device=roots.device).repeat_interleave(len(roots))
        return _Open(symbols, roots.repeat(count, 1))

    def _delta(self) -> float:
        # What is left of rtol serves kernels nearby, whose bound is this one's and a difference's.
        return max(0.6 * self._budget.rtol, 64 * UNIT_ROUNDOFF)

    def _raise_to_best(self) -> None:
        values = self.best.values.clamp_min(0).sqrt().tolist()
        delta = self._delta()
        self.tau = [max(t, v * (1 + delta)) for t, v in zip(self.tau, values, strict=True)]

    def _surveyed(self) -> Peaks:
        """From the roots with the largest values, upwards."""
        roots = self._roots()
        found = [
            looked_at(
                self._stack, roots.symbols[part], roots.centres[part],
                start_vectors(len(roots.symbols[part]), self._stack.sides[0], self._budget.seed,
                              self._stack.taps),
                _LOOK_STEPS,
            )
            for part in batches(len(roots.symbols), self._batch)
        ]  # fmt: skip
        return self._ascended(self._highest(joined(found), self._owners_of(roots), _SURVEYED))

    def _highest(self, peaks: Peaks, owners: list[int], most: int) -> Peaks:
        """The highest peaks of each kernel, at most so many."""
        values = peaks.values.tolist()
        counts, chosen = [0] * self._kernels, []
        for index in sorted(range(len(values)), key=lambda i: -values[i]):
            if counts[owners[index]] < most:
                counts[owners[index]] += 1
                chosen.append(index)
        return peaks[torch.tensor(chosen, device=peaks.values.device)]

    def _ascended(self, peaks: Peaks, rounds: int = ROUNDS) -> Peaks:
        """The highest peak of each kernel, from those given; one at least for each."""
        found = ascended(self._stack, self._cells, peaks, self._memory, rounds)
        owners = [self._owners[symbol] for symbol in found.symbols.tolist()]
        highest = self._highest(found, owners, 1)
        owners = [self._owners[symbol] for symbol in highest.symbols.tolist()]
        order = sorted(range(len(owners)), key=owners.__getitem__)
        return highest[torch.tensor(order, device=found.values.device)]

    def _note(self, peaks: Peaks, owners: list[int]) -> bool:
        """Ascends from where a cell that was not excluded promises more. Whether tau has grown."""
        if not owners:
            return False
        best = self.best.values.tolist()
        least = 1 + 0.1 * self._budget.rtol
        promising = [
            index
            for index, (value, owner) in enumerate(zip(peaks.values.tolist(), owners, strict=True))
            if value > best[owner] * least
        ]
        if not promising:
            return False
        some = peaks[torch.tensor(promising, device=peaks.values.device)]
        some = self._highest(some, [owners[index] for index in promising], 1)
        before = list(self.tau)
        self.best = self._ascended(joined([self.best, some]), FEW_ROUNDS)
        self._raise_to_best()
        return self.tau != before

    def _tested(self, cells: _Open, level: int) -> tuple[_Open, Peaks]:
        """The cells that are not excluded, and what their symbols' tops look like."""
        cosine = self._cells.cosine(level)
        # Lowered by more than the product and the difference are rounded.
        tau = torch.tensor(self.tau, dtype=torch.float64, device=self._errors.device)
        targets = tau[self._stack.owners] * (cosine * (1 - 16 * UNIT_ROUNDOFF))
        for owner in self._owners_of(cells):
            self.tested[owner] += 1
        left, peaks = [], []
        for part in batches(len(cells.symbols), self._batch):
            symbols, centres = cells.symbols[part], cells.centres[part]
            open_, gram = self._not_excluded(symbols, centres, targets[symbols])
            if not len(open_):
                continue
            start = start_vectors(len(open_), gram.shape[1], self._budget.seed, self._stack.taps)
            values, vectors = top_vectors(gram, start, _LOOK_STEPS)
            left.append(_Open(symbols[open_], centres[open_]))
            peaks.append(Peaks(values, symbols[open_], centres[open_], vectors))
        if not left:
            nothing = torch.empty(0, dtype=torch.long, device=cells.symbols.device)
            return cells[nothing], self.best[nothing]
        together = _Open(
            torch.cat([one.symbols for one in left]), torch.cat([one.centres for one in left])
        )
        return together, joined(peaks)

    def _not_excluded(
        self, symbols: Tensor, centres: Tensor, most: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which frequencies no proof says to be at most `most`, and their Gram matrices."""
        if self._stack.products is not None:
            at = symbols, centres
            bounds, shifted, shifts = prove_grams(self._stack, self._errors, at, most)
            open_ = (~(bounds <= most)).nonzero()[:, 0]
            gram = shifted[open_].neg_()
            gram.diagonal(dim1=1, dim2=2).add_(shifts[open_, None])
            return open_, gram
        parts = self._stack.at(symbols, self._stack.phases(centres))
        b = torch.complex(*parts)
        gram, errors = torch.bmm(b, b.mH), self._errors[symbols]
        # The second one is for the rounding of the sum.
        bounds = prove(*parts, gram, most - 3 * errors)
        open_ = (~(bounds + 2 * errors <= most)).nonzero()[:, 0]
        return open_, gram[open_]

    def _stays(self, owners: list[int], level: int) -> list[bool]:
        """Which cells are not split: those of kernels whose budget does not allow it."""
        if not self._cells.splits(level):
            return [True] * len(owners)
        children = 2 ** max(self._cells.axes, 2) if self._cells.axes > 1 else 2
        counts = Counter(owners)
        spent = {
            owner: self.tested[owner] + children * count > self._budget.max_cells
            for owner, count in counts.items()
        }
        return [spent[owner] for owner in owners]

    def _cover_at_last(self, left: _Open, peaks: Peaks, level: int) -> None:
        """Tau rises until it covers what is left, which is not split any more."""
        # On a grid there is no angle to lose: the values found may still grow, and are the bound.
        grown, cosine = self._cells.on_grid, self._cells.cosine(level)
        step = self._delta() if grown else max(self._delta(), 0.01)
        while len(left.symbols):
            if not grown:
                roots = peaks.values.clamp_min(0).sqrt().tolist()
                needed = dict.fromkeys(self._owners_of(left), 0.0)
                for owner, root in zip(self._owners_of(left), roots, strict=True):
                    needed[owner] = max(needed[owner], root / cosine)
                for owner, value in needed.items():
                    self.tau[owner] = max(self.tau[owner], value) * (1 + step)
                step *= 2
            left, peaks = self._tested(left, level)
            grown = self._note(peaks, self._owners_of(left))

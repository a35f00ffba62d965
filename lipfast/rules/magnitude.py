"""How large activations can be: what a product of two of them needs for a finite bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.rounding import gamma
from lipfast.rules.upward import Upward

_UNKNOWN = Upward(math.inf)


@dataclass(frozen=True)
class Magnitude:
    """Upper bounds on the size of an activation, over all inputs of the domain.

    Attributes:
        entry: of every entry, ``|x_i|``.
        row: of the Euclidean norm along the last axis.
        total: of the Euclidean norm of a sample.
    """

    entry: Upward = _UNKNOWN
    row: Upward = _UNKNOWN
    total: Upward = _UNKNOWN

    def within(self, shape: Sequence[int]) -> Magnitude:
        """Tighten each bound by the others, for samples of a shape."""
        count = math.prod(shape)
        last = shape[-1] if shape else 1
        rows = count // max(1, last)
        entry = _least(self.entry, self.row, self.total)
        row = _least(self.row, self.total, entry * _root(last))
        total = _least(self.total, row * _root(rows))
        return Magnitude(entry, row, total)

    def scaled(self, factor: Upward | float) -> Magnitude:
        """The size of ``c x`` for numbers ``|c| <= factor``, one or one per entry."""
        return Magnitude(self.entry * factor, self.row * factor, self.total * factor)

    def plus(self, other: Magnitude) -> Magnitude:
        """The size of a sum."""
        return Magnitude(self.entry + other.entry, self.row + other.row, self.total + other.total)

    def tightened(self, other: Magnitude) -> Magnitude:
        """The size of something that both bound."""
        return Magnitude(
            _least(self.entry, other.entry),
            _least(self.row, other.row),
            _least(self.total, other.total),
        )


def _least(*values: Upward) -> Upward:
    return min(values, key=lambda value: value.log)


def _root(count: int) -> Upward:
    return Upward.of(float(count)).square_root()


def of_tensor(tensor: Tensor) -> Magnitude:
    """The size of a parameter or a constant; unknown of one that is not finite (a mask)."""
    return of_numbers(numbers_of_tensors(tensor[None])[0].tolist(), tensor.numel())


def numbers_of_tensors(tensors: Tensor) -> Tensor:
    """(N, 3): what `of_numbers` takes of each of (N, *shape).

    The largest magnitude, and of what is divided by it the squares of the largest Euclidean norm
    along the last axis and of the whole: scaled, so that squares neither overflow nor all
    underflow.
    """
    values = tensors.detach().double().abs()
    if not values[0].numel():
        return values.new_zeros(len(values), 3)
    rows = values.reshape(len(values), -1, values.shape[-1] if values.dim() > 1 else 1)
    peaks = rows.amax((1, 2))
    scales = torch.where(peaks > 0, peaks, 1.0)
    squares = (rows / scales[:, None, None]).square().sum(-1)
    return torch.stack([peaks, squares.amax(1), squares.sum(1)], 1)


def of_numbers(numbers: Sequence[float], count: int) -> Magnitude:
    """The size of a tensor of `count` entries, from its `numbers_of_tensors`."""
    peak, row, total = numbers
    if not math.isfinite(peak):
        return Magnitude()
    if peak == 0.0:
        return Magnitude(Upward.of(0.0), Upward.of(0.0), Upward.of(0.0))
    wide = 1.0 + 2 * gamma(count + 8)
    lengths = [(Upward.of(value) * wide).square_root() * peak for value in (row, total)]
    return Magnitude(Upward.of(peak), *lengths)

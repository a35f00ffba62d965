"""Maps along one axis whose rows are windows: exact norms of what pools and resampling do.

Pools over several axes are tensor products of such maps, and the norm of a tensor product is the
product of the norms, for p = 1, 2 and inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from lipfast.ops.spectral_norms import spectral_norms
from lipfast.rounding import UNIT_ROUNDOFF
from lipfast.rules.upward import Upward

# Beyond this many entries a matrix is not formed: sqrt(||A||_1 ||A||_inf) bounds it.
_LARGEST_MATRIX = 1 << 21


@dataclass(frozen=True)
class WindowMap:
    """A matrix with few entries per row, in exact arithmetic.

    Attributes:
        size: number of columns.
        rows: for each row pairs (column, entry), every column at most once.
    """

    size: int
    rows: tuple[tuple[tuple[int, Fraction], ...], ...]

    def dense(self) -> torch.Tensor:
        """The matrix with entries rounded to float64."""
        matrix = torch.zeros(len(self.rows), self.size, dtype=torch.float64, device="cpu")
        for row, pairs in enumerate(self.rows):
            for column, value in pairs:
                matrix[row, column] = float(value)
        return matrix


def rounded_up(value: Fraction) -> float:
    """The smallest float64 that is not below a rational number."""
    nearest = float(value)
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


@lru_cache(maxsize=256)
def norm_of(windows: WindowMap, p: float) -> Upward:
    """Operator norm, rounded up: exact for p = 1, inf and disjoint windows."""
    columns = [Fraction(0)] * windows.size
    counts = [0] * windows.size
    for pairs in windows.rows:
        for column, value in pairs:
            columns[column] += abs(value)
            counts[column] += 1
    column_sum = Upward.of(rounded_up(max(columns, default=Fraction(0))))
    largest = max((sum(abs(value) for _, value in row) for row in windows.rows), default=0)
    row_sum = Upward.of(rounded_up(Fraction(largest)))
    if p == 1:
        return column_sum
    if math.isinf(p):
        return row_sum
    if max(counts, default=0) <= 1:  # rows with disjoint supports are orthogonal
        squares = max((sum(value * value for _, value in row) for row in windows.rows), default=0)
        return Upward.of(rounded_up(Fraction(squares))).square_root()
    bound = (column_sum * row_sum).square_root()
    if windows.size * len(windows.rows) > _LARGEST_MATRIX:
        return bound
    found = float(spectral_norms([windows.dense()], rtol=1e-9).upper[0])
    # Entries are off by at most u each: by u ||A||_F <= u sqrt(rank) ||A||_2 in norm.
    rank = min(windows.size, len(windows.rows))
    widened = Upward.of(found) * (1.0 + 4 * UNIT_ROUNDOFF * (1.0 + math.sqrt(rank)))
    return min(bound, widened, key=lambda entry: entry.log)


@lru_cache(maxsize=256)
def average_windows(
    size: int, count: int, window: tuple[int, int, int], include_padding: bool
) -> WindowMap:
    """`count` windows (kernel, stride, padding) of an average pool.

    The divisor is torch's, also in ceil mode: entries of the window inside the padded axis.
    """
    kernel, stride, padding = window
    rows = []
    for index in range(count):
        first = index * stride - padding
        last = min(first + kernel, size + padding)
        inside = range(max(first, 0), min(last, size))
        divisor = last - first if include_padding else len(inside)
        rows.append(tuple((column, Fraction(1, max(1, divisor))) for column in inside))
    return WindowMap(size, tuple(rows))


@lru_cache(maxsize=256)
def adaptive_windows(size: int, count: int) -> WindowMap:
    """Windows ``[floor(i size / count), ceil((i + 1) size / count))`` of an adaptive pool."""
    rows = []
    for index in range(count):
        inside = range(index * size // count, -(-(index + 1) * size // count))
        rows.append(tuple((column, Fraction(1, len(inside))) for column in inside))
    return WindowMap(size, tuple(rows))


def multiplicity(size: int, windows: Sequence[range]) -> int:
    """The largest number of windows that one position is in."""
    counts = [0] * size
    for window in windows:
        for position in window:
            if 0 <= position < size:
                counts[position] += 1
    return max(counts, default=0)


def pool_windows(count: int, kernel: int, stride: int, padding: int, dilation: int) -> list[range]:
    """Positions of `count` windows; those in the padding are outside the axis."""
    starts = (index * stride - padding for index in range(count))
    return [range(start, start + dilation * (kernel - 1) + 1, dilation) for start in starts]

"""Vectors that lie one after another in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Vectors:
    """Consecutive pieces of a tensor, cut when they are first asked for.

    Cutting tens of thousands of pieces takes longer than computing small ones, and is often for
    nothing.

    Attributes:
        joined: the vectors, one after another.

    Args:
        values: the vectors, joined.
        sizes: of the vectors; their sum is the size of `values`.

    Example:
        >>> import torch
        >>> Vectors(torch.arange(3.0), [1, 2]).cut()
        [tensor([0.]), tensor([1., 2.])]
    """

    def __init__(self, values: Tensor, sizes: Sequence[int]) -> None:
        self.joined = values
        self._sizes = list(sizes)
        self._pieces: list[Tensor] | None = None

    def cut(self) -> list[Tensor]:
        """The vectors; the same list each time."""
        if self._pieces is None:
            self._pieces = list(torch.split(self.joined, self._sizes))
        return self._pieces

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.cut())

    def __getitem__(self, index: int) -> Tensor:
        return self.cut()[index]

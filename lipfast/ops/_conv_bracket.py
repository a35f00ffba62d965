"""What a call of `conv_norms` may spend, and what is found of one kernel's symbol."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Budget(NamedTuple):
    """What one call may spend, and what for."""

    rtol: float
    seed: int
    max_passes: int
    max_cells: int
    memory: int


class NativeBracket(NamedTuple):
    """What the native op, or the device's search, says of one kernel's symbol.

    Attributes:
        lower: at `frequency` of `group`.
        upper: never below S.
        frequency: cycles per tap, (3,).
        group: of channels.
        cells: that were factored.
        method: how `upper` was proved.
        left: singular vector of the symbol (rows): real parts, then imaginary parts.
        right: alike (cols).
    """

    lower: float
    upper: float
    frequency: Tensor
    group: int
    cells: int
    method: str
    left: Tensor
    right: Tensor

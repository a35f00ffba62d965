"""What proves a bound by quadratic constraints: a few numbers that anybody can check again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Multipliers = Sequence[Tensor]
"""Base-2 logarithms of D of the weights as they are, (n_i,) per activation."""


@dataclass(frozen=True, eq=False)
class QuadraticCertificate:
    r"""Multipliers for which one matrix is positive, which proves the bound of a chain.

    The matrices $W_1 \ldots W_{h+1}$ of the folded graph are rescaled by powers of two, $W_i[j, k]
    2^{e_i[j] - e_{i-1}[k] - s_i}$ with $e_0 = e_{h+1} = 0$; for $D_1 \ldots D_h$ and $\rho^2$ the
    block tridiagonal matrix of docs/bounds.md is positive, and the bound is $\rho 2^{\sum s_i}$
    times the constant of an op behind the last matrix. Ranges of slopes are not here: they are the
    architecture's.

    Attributes:
        layers: names of the matrices.
        multipliers: D_i, (n_i,) float64.
        units: e_i, (n_i,) int32.
        maps: s_i.
        square: rho^2.
    """

    layers: tuple[str, ...]
    multipliers: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    maps: tuple[int, ...]
    square: float

    def __repr__(self) -> str:
        sizes = "-".join(str(len(own)) for own in self.multipliers)
        return f"QuadraticCertificate({len(self.layers)} matrices, hidden {sizes})"

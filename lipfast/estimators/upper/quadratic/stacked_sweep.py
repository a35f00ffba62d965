"""Sweeps through many chains at once, on a device or not: values and gradients without a look.

No part of a proof. All tensors are float64 and begin with a dimension of networks; what a factor
or a number is worth is found by `torch.where`, never by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.residual_proof import power_scaled
from lipfast.ops.small_tops import top_of_small

# Of more rows than these M is looked at in the span of a few vectors, found by so many products.
_MOST_ROWS, _SPAN, _PRODUCTS = 64, 16, 4
# Squarings between two scalings: the largest eigenvalue is at least 1/64 of the trace.
_SQUARINGS_BETWEEN = 4
# After so many the smoothed maximum is within 3e-7 of the maximum.
_MANY_SQUARINGS = 24
# Vectors that a power of a matrix is applied to; of Lanczos' process.
_COLUMNS, _STEPS = 8, 12
_NO_EXPONENT = 1 << 20
_LEAST_TRACE = 1e-300


class StackedChains(NamedTuple):
    """N chains of one architecture.

    Attributes:
        weights: W_i, (N, n_i, n_{i-1}).
        means: m, per hidden layer (N, n_i), or (1, n_i) for all networks.
        products: p, alike; None where all are 0.
    """

    weights: Sequence[Tensor]
    means: Sequence[Tensor]
    products: Sequence[Tensor | None]

    @property
    def sizes(self) -> list[int]:
        """Widths of the hidden layers."""
        return [mean.shape[-1] for mean in self.means]


class StackedSweep(NamedTuple):
    """What a sweep made.

    Attributes:
        factors: L_i, lower, of D_i - K_i.
        behind: L_i^-1 m D_i W_{i+1}^T.
        last: M, the last K.
        failed: for each network whether a factorisation did.
    """

    factors: list[Tensor]
    behind: list[Tensor]
    last: Tensor
    failed: Tensor


MultiplierChoice = Callable[[int, Tensor], Tensor]
"""The multipliers of a hidden layer, from its K."""


def stacked_sweep(chains: StackedChains, choose: MultiplierChoice) -> StackedSweep:
    r"""Carry $K_i = W_i Y_{i-1} W_i^T$ through the chains.

    $Y_0 = I$, $Y_i = m D (D - K_i)^{-1} D m - p D$, as in `lipfast.reference.chain_quadratic`.
    """
    first = chains.weights[0]
    below = first @ first.mT
    failed = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    factors, behind = [], []
    for layer, (mean, product) in enumerate(zip(chains.means, chains.products, strict=True)):
        d, weight = choose(layer, below), chains.weights[layer + 1]
        factor, info = torch.linalg.cholesky_ex(torch.diag_embed(d) - below)
        failed = failed | (info != 0)
        right = (mean * d)[..., None] * weight.mT
        right = torch.linalg.solve_triangular(factor, right, upper=False)
        below = right.mT @ right
        if product is not None:
            below = below - (weight * (product * d)[..., None, :]) @ weight.mT
        factors.append(factor)
        behind.append(right)
    return StackedSweep(factors, behind, below, failed)


def value_and_gradient(
    chains: StackedChains, logs: Tensor, squarings: int
) -> tuple[Tensor, Tensor]:
    r"""$\log (tr M^q)^{1/q}$, q = 2^s + 1, and its gradient in log D; inf where D is not feasible.

    $\partial / \partial D_j = \sum 2 m w s - s^2 - p w^2$ over the columns of w, with
    $s_i = (D_i - K_i)^{-1} m D_i w_i$, $w_i = W_{i+1}^T s_{i+1}$, and $s_{h+1} = Q$, $Q Q^T =
    M^{q-1} / tr M^q$.

    Args:
        chains: N of them.
        logs: log D, (N, units of all hidden layers).
        squarings: s.
    """
    multipliers = torch.split(logs.exp(), chains.sizes, 1)
    found = stacked_sweep(chains, lambda layer, _: multipliers[layer])
    value, s = _smoothed(found.last, squarings)
    value = torch.where(found.failed | ~value.isfinite(), torch.inf, value)
    parts = []
    for layer in reversed(range(len(multipliers))):
        product, mean = chains.products[layer], chains.means[layer][..., None]
        w = chains.weights[layer + 1].mT @ s
        factor = found.factors[layer]
        s = torch.linalg.solve_triangular(factor.mT, found.behind[layer] @ s, upper=True)
        part = ((2 * mean * w - s) * s).sum(-1)
        if product is not None:
            part = part - product * w.square().sum(-1)
        parts.append(multipliers[layer] * part)
    return value, torch.cat(parts[::-1], 1)


def log_largest(last: Tensor) -> Tensor:
    """The logarithm of M's largest eigenvalue, or a little more."""
    if last.shape[-1] <= _MOST_ROWS:
        return _smoothed(last, _MANY_SQUARINGS)[0]
    log = _smoothed(last, _MANY_SQUARINGS)[0]
    # The span of a few vectors holds less than all of it: more until a factor says so.
    excess = torch.full_like(log, 1e-2)
    identity = torch.eye(last.shape[-1], dtype=last.dtype, device=last.device)
    for power in (-4.0, -6.0, -7.0, -8.0):
        room = torch.full_like(log, 10.0**power)
        square = log.exp() * (1 + room)
        info = torch.linalg.cholesky_ex(square[:, None, None] * identity - last)[1]
        excess = torch.where(info == 0, room, excess)
    return log + excess


def _smoothed(last: Tensor, squarings: int) -> tuple[Tensor, Tensor]:
    """The value of `value_and_gradient` and Q, by squarings: eigenvalues make the host wait."""
    if last.shape[-1] > _MOST_ROWS:
        span = _span(last)
        value, inner = _smoothed(span.mT @ (last @ span), squarings)
        return value, span @ inner
    trace = _trace(last).clamp_min(_LEAST_TRACE)
    power = first = last / trace[:, None, None]
    # M / trace to the power 2^j is `power` times exp(scale).
    scale = torch.zeros_like(trace)
    for done in range(1, squarings):
        power, scale = power @ power, 2 * scale
        if done % _SQUARINGS_BETWEEN == 0:
            own = _trace(power).clamp_min(_LEAST_TRACE)
            power, scale = power / own[:, None, None], scale + own.log()
    total = ((power @ first) * power).sum((-2, -1)).clamp_min(_LEAST_TRACE)
    value = trace.log() + (total.log() + 2 * scale) / (2.0**squarings + 1)
    return value, power / (total * trace).sqrt()[:, None, None]


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _start_columns(like: Tensor, columns: int) -> Tensor:
    """Vectors (rows, columns) that are as good as random ones, made where they are needed."""
    numbers = torch.arange(like.shape[-1] * columns, dtype=like.dtype, device=like.device)
    return ((numbers + 1) * 1.7).sin().reshape(-1, columns)


def _span(last: Tensor) -> Tensor:
    """Orthonormal vectors (N, rows, few) that hold most of the top of M."""
    trace = _trace(last).clamp_min(_LEAST_TRACE)
    scaled = last / trace[:, None, None]
    vectors = _start_columns(last, _SPAN).expand(len(last), -1, -1)
    identity = torch.eye(_SPAN, dtype=last.dtype, device=last.device)
    for _ in range(_PRODUCTS):
        vectors = scaled @ (scaled @ vectors)
        # Twice: once leaves as much as the square of their condition number.
        for _ in range(2):
            vectors = vectors / vectors.norm(dim=-2, keepdim=True).clamp_min(_LEAST_TRACE)
            gram = vectors.mT @ vectors + 1e-13 * identity
            factor = torch.linalg.cholesky_ex(gram)[0]
            vectors = torch.linalg.solve_triangular(factor, vectors.mT, upper=False).mT
    return vectors


def largest_beside(below: Tensor, shape: Tensor) -> Tensor:
    r"""At most $\lambda_{max}(S^{-1/2} K S^{-1/2})$ but for rounding, and near it (Lanczos)."""
    root = shape.rsqrt()
    matrix = root[..., None] * below * root[..., None, :]
    vector = _start_columns(below, 1).expand(len(below), -1, -1)
    basis = vector[..., :0]
    for _ in range(min(_STEPS, below.shape[-1])):
        # Twice: little may be left of it, of matrices of low rank nothing.
        for _ in range(2):
            vector = vector - basis @ (basis.mT @ vector)
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min(_LEAST_TRACE)
        basis = torch.cat([basis, vector], -1)
        vector = matrix @ vector
    return top_of_small(basis.mT @ matrix @ basis)[0]


def balancing_exponents(weights: Sequence[Tensor], sweeps: int = 3) -> list[Tensor]:
    """e_i, (N, n_i) int64, so that rows of W_i 2^e_i are as large as the columns they meet."""
    sizes = [weight.abs().log2() for weight in weights]
    units = [torch.zeros_like(weight[..., 0]) for weight in weights]
    for _ in range(sweeps):
        for layer in range(len(weights) - 1):
            rows, columns = sizes[layer], sizes[layer + 1] + units[layer + 1][..., None]
            if layer:
                rows = rows - units[layer - 1][..., None, :]
            row, column = rows.amax(-1) + units[layer], columns.amax(-2) - units[layer]
            units[layer] = units[layer] + _balancing_steps(row, column)
    return [own.long() for own in units[:-1]]


def _balancing_steps(row: Tensor, column: Tensor) -> Tensor:
    """From log2 of what a unit's row and its column are, -inf where they are zero.

    Where one of them is zero the unit does nothing, and the other shall not be seen beside those of
    units that do.
    """
    nothing = -torch.inf
    alive = (row > nothing) & (column > nothing)
    least_row, least_column = (
        torch.where(alive, own, torch.inf).amin(-1, keepdim=True) for own in (row, column)
    )
    idle = torch.where(column > nothing, column - least_column, least_row - row)
    return torch.where(alive, (column - row) / 2, idle).round().nan_to_num(0.0, 0.0, 0.0)


def rescaled(weights: Sequence[Tensor], units: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Weights ``W 2^(e_i - e_{i-1} - s_i)``, of norms near 1, and s, (N, L) int64."""
    found, maps = [], []
    for index, weight in enumerate(weights):
        powers = torch.zeros((1, 1, 1), dtype=torch.int64, device=weight.device)
        if index < len(units):
            powers = powers + units[index][..., None]
        if index:
            powers = powers - units[index - 1][..., None, :]
        exponents = torch.frexp(weight).exponent + powers
        # A zero's exponent says nothing.
        largest = torch.where(weight != 0, exponents, -_NO_EXPONENT).amax((-2, -1))
        largest = torch.where(largest > -_NO_EXPONENT, largest, 0)
        small = power_scaled(weight, powers - largest[:, None, None])
        vectors = _start_columns(small, _COLUMNS)
        for _ in range(3):
            before, vectors = vectors, small.mT @ (small @ vectors)
        ratios = vectors.norm(dim=-2) / before.norm(dim=-2).clamp_min(_LEAST_TRACE)
        rest = (ratios.amax(-1).log2() / 2).round().nan_to_num(0.0, 0.0, 0.0).long()
        found.append(power_scaled(small, -rest[:, None, None]))
        maps.append(largest + rest)
    return found, torch.stack(maps, 1)

"""Quadratic constraints of a chain: the sweep, a search for its multipliers, and the proof.

The chain is v_i = W_i x_{i-1}, x_i = phi_i(v_i) (i = 1 .. h), y = W_{h+1} x_h (biases do not
matter). Slopes of phi_i satisfy sigma^2 - 2 m sigma + p <= 0, unit by unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.reference.spectral_norms import UNIT_ROUNDOFF, gamma

# Of the smoothed maximum: for searches of so many times ten evaluations, one after the other.
_POWERS = ((64,), (16, 256), (16, 64, 256))
# Of steps in log D: the first, the longest, and how many are remembered.
_FIRST_STEP, _LONGEST_STEP, _HISTORY = 0.3, 2.0, 8


class Scaled(NamedTuple):
    """A chain whose units and weights are rescaled by powers of two.

    Attributes:
        weights: W_i[j, k] 2^(e_i[j] - e_{i-1}[k] - s_i), float64, about of norm 1.
        means: m, one tensor (n_i,) per hidden layer.
        products: p, alike.
        errors: bounds of the weights' own errors, scaled alike; None for exact weights.
        units: e_i, per hidden layer.
        maps: s_i, per weight.
    """

    weights: list[Tensor]
    means: list[Tensor]
    products: list[Tensor]
    errors: list[Tensor | None]
    units: list[Tensor]
    maps: list[int]


class Proved(NamedTuple):
    """What `chain_quadratic` found.

    Attributes:
        log_value: of the certified bound; inf where nothing was proved.
        multipliers: D of the rescaled chain.
        square: rho^2 of the rescaled chain.
        chain: the rescaled chain.
    """

    log_value: float
    multipliers: list[Tensor]
    square: float
    chain: Scaled


def scaled_chain(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    products: Sequence[Tensor],
    errors: Sequence[Tensor | None] | None = None,
) -> Scaled:
    """Balance rows against columns of the next weight by powers of two, then every norm to 1.

    A diagonal of powers of two commutes with slopes, and the constraints stay as they are.
    """
    weights = [weight.double() for weight in weights]
    units = [torch.zeros(len(weight), dtype=torch.int64) for weight in weights[:-1]]
    for _ in range(50):
        moved = False
        for layer, own in enumerate(units):
            rows = _log_norms(_rescaled(weights, units, layer), 1)
            columns = _log_norms(_rescaled(weights, units, layer + 1), 0)
            step = torch.round((columns - rows) / 2)
            step = torch.where(step.isfinite(), step, 0).long()
            moved |= bool(step.any())
            units[layer] = own + step
        if not moved:
            break
    balanced = [_rescaled(weights, units, index) for index in range(len(weights))]
    tops = [float(torch.linalg.matrix_norm(w, 2)) if w.isfinite().all() else 0 for w in balanced]
    maps = [round(math.log2(top)) if 0 < top < math.inf else 0 for top in tops]
    bounds = [None] * len(weights) if errors is None else errors
    return Scaled(
        [_rescaled(weights, units, index, maps[index]) for index in range(len(weights))],
        [mean.double() for mean in means],
        [product.double() for product in products],
        [
            None if e is None else _rescaled([e] * len(weights), units, i, maps[i])
            for i, e in enumerate(bounds)
        ],
        units,
        maps,
    )


def _log_norms(matrix: Tensor, dim: int) -> Tensor:
    """Base-2 logarithms of the lengths of rows (dim 1) or columns; -inf for zeros."""
    largest = matrix.abs().amax(dim, keepdim=True)
    shrunk = matrix / torch.where(largest > 0, largest, 1)
    lengths: Tensor = torch.linalg.vector_norm(shrunk, dim=dim)
    return largest.squeeze(dim).log2() + lengths.log2()


def _rescaled(
    weights: Sequence[Tensor], units: Sequence[Tensor], index: int, down: int = 0
) -> Tensor:
    """Apply all exponents of a weight at once: one rounding where the result is denormal."""
    exponents = torch.full(weights[index].shape, -down, dtype=torch.int64)
    if index < len(units):
        exponents += units[index][:, None]
    if index > 0:
        exponents -= units[index - 1]
    mantissas, own = torch.frexp(weights[index])
    total = (own + exponents).clamp(-1100, 1100)
    half = total // 2
    return torch.ldexp(torch.ldexp(mantissas, total - half), half)


class _Sweep(NamedTuple):
    """Factors of D_i - K_i, the matrices W_{i+1} m D L^-T behind them, and the last K."""

    factors: list[Tensor]
    behind: list[Tensor]
    last: Tensor


def sweep(chain: Scaled, multipliers: Sequence[Tensor]) -> _Sweep | None:
    r"""Carry $K_i = W_i Y_{i-1} W_i^T$ through the chain; None where a $D_i - K_i$ is not positive.

    $Y_0 = I$, $Y_i = m D (D - K_i)^{-1} D m - p D$.
    """
    below = chain.weights[0] @ chain.weights[0].T
    factors, behind = [], []
    for layer, d in enumerate(multipliers):
        if not bool(torch.isfinite(below).all()):
            return None
        factor, failed = torch.linalg.cholesky_ex(torch.diag(d) - below)
        if int(failed) or not bool(torch.isfinite(factor).all()):
            return None
        weight, mean = chain.weights[layer + 1], chain.means[layer]
        right = torch.linalg.solve_triangular(factor, (mean * d)[:, None] * weight.T, upper=False)
        factors.append(factor)
        behind.append(right.T)
        below = right.T @ right - (weight * (chain.products[layer] * d)) @ weight.T
    return _Sweep(factors, behind, below) if bool(torch.isfinite(below).all()) else None


def closed_form(chain: Scaled) -> list[Tensor]:
    r"""Multipliers that are feasible without a search.

    $S_j = \sqrt{K_{jj}} / \|W_{i+1} e_j\|$ and $D = c \lambda_{max}(S^{-1/2} K S^{-1/2}) S$ with
    $c_j = \max(1 + |m_j| / r_j, 1 + 10^{-6})$, $r^2 = m^2 - p$.
    """
    below = chain.weights[0] @ chain.weights[0].T
    found: list[Tensor] = []
    for layer, (mean, product) in enumerate(zip(chain.means, chain.products, strict=True)):
        columns = chain.weights[layer + 1].norm(dim=0)
        diagonal = below.diagonal().clamp_min(0).sqrt()
        shape = torch.ones_like(diagonal)
        if bool(columns.any()) and bool(diagonal.any()):
            shape = diagonal / torch.maximum(columns, columns.max() * 1e-6)
            shape = torch.maximum(shape, shape.max() * 1e-6)
        root = shape.rsqrt()
        top = float(torch.linalg.eigvalsh(root[:, None] * below * root)[-1])
        radius = (mean * mean - product).clamp_min(0).sqrt()
        factor = (1 + mean.abs() / radius).clamp(1 + 1e-6, 1e6)
        found.append(factor * shape * top if top > 0 else torch.full_like(shape, 2.0**-100))
        done = sweep(
            chain._replace(weights=chain.weights[: layer + 2], means=chain.means[: layer + 1]),
            found,
        )
        if done is None:
            break
        below = done.last
    return found


def _log_gradient(
    chain: Scaled, found: _Sweep, multipliers: Sequence[Tensor], power: int
) -> Tensor:
    r"""Gradient of $\log (tr M^q)^{1/q}$ in log D, M the last K: all layers, one after the other.

    $\partial / \partial D_j = \sum 2 m w s - s^2 - p w^2$ over the columns of w, with
    $s = (D - K)^{-1} m D w$, $w = W_{h+1}^T Q$, $Q Q^T = M^{q-1} / tr M^q$, and $w = W_i^T s$ for
    the layer before.
    """
    values, vectors = torch.linalg.eigh(found.last)
    share = (values / values[-1]).clamp_min(0)
    weights = share ** (power - 1) / (values[-1] * (share**power).sum())
    right = chain.weights[-1].T @ (vectors * weights.sqrt())
    parts: list[Tensor] = []
    for layer in reversed(range(len(multipliers))):
        mean, product = chain.means[layer][:, None], chain.products[layer][:, None]
        d = multipliers[layer][:, None]
        s = torch.cholesky_solve(mean * d * right, found.factors[layer])
        parts.append((d * (2 * mean * right * s - s * s - product * right * right)).sum(1))
        right = chain.weights[layer].T @ s
    return torch.cat(parts[::-1])


class _Point(NamedTuple):
    """Multipliers of all layers as one vector of logarithms, and what they give."""

    logs: Tensor
    value: float
    gradient: Tensor
    top: float


def _layers(chain: Scaled, logs: Tensor) -> list[Tensor]:
    return list(torch.split(logs.exp(), [len(mean) for mean in chain.means]))


def _evaluated(chain: Scaled, logs: Tensor, power: int) -> _Point | None:
    multipliers = _layers(chain, logs)
    found = sweep(chain, multipliers)
    if found is None:
        return None
    values = torch.linalg.eigvalsh(found.last)
    top = float(values[-1])
    if not top > 0:
        return None
    smooth = math.log(float(((values / top).clamp_min(0) ** power).sum())) / power
    gradient = _log_gradient(chain, found, multipliers, power)
    return _Point(logs, math.log(top) + smooth, gradient, top)


def search(chain: Scaled, multipliers: list[Tensor], evaluations: int) -> list[Tensor]:
    """L-BFGS on log D from feasible multipliers (Nocedal, 1980); the best that were found.

    An evaluation is a sweep. The powers of the smoothed maximum grow in three stages, each of which
    starts at the best point of the one before.
    """
    best: _Point | None = None
    left = evaluations
    powers = _POWERS[min(max(evaluations // 10, 1), len(_POWERS)) - 1]
    for stage, power in enumerate(powers):
        share = left // (len(powers) - stage)
        left -= share
        logs = torch.cat(multipliers).log() if best is None else best.logs
        point = _evaluated(chain, logs, power)
        if point is None:
            break
        best = point if best is None or point.top < best.top else best
        best = _descend(chain, point, best, share - 1, power)
    return multipliers if best is None else _layers(chain, best.logs)


def _descend(chain: Scaled, point: _Point, best: _Point, evaluations: int, power: int) -> _Point:
    steps: list[Tensor] = []
    turns: list[Tensor] = []
    while evaluations > 0:
        move = -_lbfgs_product(steps, turns, point.gradient)
        move *= min(1.0, _LONGEST_STEP / max(float(move.abs().max()), 1e-300))
        slope = float(point.gradient @ move)
        length, tried = 1.0, None
        while evaluations > 0:
            tried = _evaluated(chain, point.logs + length * move, power)
            evaluations -= 1
            if tried is not None and tried.value <= point.value + 1e-4 * length * slope:
                break
            length *= 0.3 if tried is None else 0.5
            tried = None
        if tried is None:
            break
        step, turn = tried.logs - point.logs, tried.gradient - point.gradient
        if float(step @ turn) > 1e-10 * float(step.norm() * turn.norm()):
            steps, turns = [*steps, step][-_HISTORY:], [*turns, turn][-_HISTORY:]
        point = tried
        best = point if point.top < best.top else best
    return best


def _lbfgs_product(steps: list[Tensor], turns: list[Tensor], gradient: Tensor) -> Tensor:
    """The gradient times the inverse Hessian that the last steps make (two loops)."""
    if not steps:
        return gradient * (_FIRST_STEP / max(float(gradient.abs().max()), 1e-300))
    product, factors = gradient.clone(), []
    for step, turn in zip(reversed(steps), reversed(turns), strict=True):
        factors.append(float(step @ product) / float(step @ turn))
        product -= factors[-1] * turn
    product *= float(steps[-1] @ turns[-1]) / float(turns[-1] @ turns[-1])
    for step, turn in zip(steps, turns, strict=True):
        product += (factors.pop() - float(turn @ product) / float(step @ turn)) * step
    return product


def _top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def chain_quadratic(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    products: Sequence[Tensor],
    *,
    errors: Sequence[Tensor | None] | None = None,
    evaluations: int = 30,
) -> Proved:
    """A certified upper bound of the norm of a chain with any slopes of their ranges.

    Args:
        weights: of one network, at least two.
        means: m, per hidden layer.
        products: p, alike.
        errors: elementwise bounds of what the weights are off by.
        evaluations: of the search.

    Example:
        >>> import torch
        >>> weights = [torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, -1.0]])]
        >>> half, zero = [torch.full((2,), 0.5)], [torch.zeros(2)]
        >>> found = chain_quadratic(weights, half, zero)
        >>> 4.0 <= math.exp(found.log_value) <= 4.0001  # the second unit alone; the product is 7.1
        True
    """
    chain = scaled_chain(weights, means, products, errors)
    multipliers = closed_form(chain)
    found = sweep(chain, multipliers) if len(multipliers) == len(means) else None
    if found is None:
        return Proved(math.inf, multipliers, math.inf, chain)
    multipliers = search(chain, multipliers, evaluations)
    found = sweep(chain, multipliers)
    assert found is not None
    top, depth = max(_top(found.last), 2.0**-250), len(weights)
    excess = max(1e-9, 8 * max(map(_epsilon, *_counts(chain))))
    for _ in range(7):
        grown = [d * (1 + excess) ** (i + 1) for i, d in enumerate(multipliers)]
        square = top * (1 + excess) ** depth
        if is_proved(chain, grown, square):
            log = math.log(square) / 2 + sum(chain.maps) * math.log(2)
            room = 8 * UNIT_ROUNDOFF * (abs(math.log(square)) + sum(map(abs, chain.maps)) + 1)
            return Proved(log + room, grown, square, chain)
        excess *= 4
    return Proved(math.inf, multipliers, math.inf, chain)


def _counts(chain: Scaled) -> tuple[list[int], list[int]]:
    """For each block row its length in the pattern, and how many roundings an entry has."""
    rows = [len(weight) for weight in chain.weights]
    before, after = [0, *rows[:-1]], [*rows[1:], 0]
    lengths = [sum(triple) for triple in zip(before, rows, after, strict=True)]
    inputs = chain.weights[0].shape[1]
    terms = [a + b + 6 for a, b in zip([inputs, *rows[:-1]], rows, strict=True)]
    return lengths, terms


def _epsilon(length: int, terms: int) -> float:
    """What part of a diagonal entry the rounding of a factorisation can cost."""
    roundings = gamma(terms) / (1 - gamma(terms)) + 4 * UNIT_ROUNDOFF
    return length * roundings * (1 + 2.0**-10)


def is_proved(chain: Scaled, multipliers: Sequence[Tensor], square: float) -> bool:
    r"""Whether one block Cholesky factorisation proves $\rho^2$ for these multipliers.

    The matrix has the blocks $A_{11} = D_1 - W_1 W_1^T$, $A_{ii} = D_i + W_i p D_{i-1} W_i^T$,
    $A_{i+1,i} = W_{i+1} m D_i$, $D_{h+1} = \rho^2 I$; its diagonal is lowered by all that rounding
    and the errors of the weights may cost.
    """
    d = [*multipliers, torch.full((len(chain.weights[-1]),), square, dtype=torch.float64)]
    pd = [p * own for p, own in zip(chain.products, multipliers, strict=True)]
    numbers = [*chain.weights, *chain.means, *chain.products]
    if not all(bool((t.abs() <= 2.0**50).all()) for t in numbers):
        return False
    blocks = [torch.zeros(len(w), len(w), dtype=torch.float64) for w in chain.weights]
    for i, own in enumerate(pd):
        blocks[i + 1] = (chain.weights[i + 1] * own) @ chain.weights[i + 1].T
    diagonals = [own + block.diagonal() for own, block in zip(d, blocks, strict=True)]
    for own in (*d, *diagonals):
        if not bool(((own >= 2.0**-300) & (own <= 2.0**300)).all()):
            return False
    lowered = _lowered(chain, diagonals, multipliers, pd)
    below = chain.weights[0] @ chain.weights[0].T
    for i, entries in enumerate(lowered):
        if not bool(torch.isfinite(entries).all()):
            return False
        off = blocks[i] - torch.diag(blocks[i].diagonal()) - below
        factor, failed = torch.linalg.cholesky_ex(off + torch.diag(entries))
        if int(failed) or not bool(torch.isfinite(factor).all()):
            return False
        if i < len(pd):
            right = (chain.means[i] * multipliers[i])[:, None] * chain.weights[i + 1].T
            solved = torch.linalg.solve_triangular(factor, right, upper=False)
            below = solved.T @ solved
    return True


def _lowered(
    chain: Scaled, diagonals: list[Tensor], multipliers: Sequence[Tensor], pd: list[Tensor]
) -> list[Tensor]:
    """Diagonals less all error terms, rounded down."""
    roots = [a.sqrt() for a in diagonals]
    losses = [a * _epsilon(*counts) for a, *counts in zip(diagonals, *_counts(chain), strict=True)]
    for i, (weight, error) in enumerate(zip(chain.weights, chain.errors, strict=True)):
        size = weight.abs()
        inner = torch.ones(weight.shape[1], dtype=torch.float64) if i == 0 else pd[i - 1].abs()
        if i > 0:
            sums = size @ (inner * (size.T @ (1 / roots[i])))
            losses[i] += gamma(weight.shape[1] + 8) * roots[i] * sums
        if error is None:
            continue
        off = size @ (inner * (error.T @ (1 / roots[i])))
        off += error @ (inner * ((size + error).T @ (1 / roots[i])))
        losses[i] += roots[i] * off * (1 + 2.0**-10)
        if i > 0:
            reach = chain.means[i - 1].abs() * multipliers[i - 1]
            losses[i] += roots[i] * (error @ (reach / roots[i - 1])) * (1 + 2.0**-10)
            losses[i - 1] += roots[i - 1] * reach * (error.T @ (1 / roots[i])) * (1 + 2.0**-10)
    room = 1 + 2.0**-10
    infinity = torch.tensor(-torch.inf, dtype=torch.float64)
    return [
        torch.nextafter(a - loss * room, infinity)
        for a, loss in zip(diagonals, losses, strict=True)
    ]

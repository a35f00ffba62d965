"""Quadratic constraints of a chain: never below what slopes reach, and close to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.boxes import boxes_of
from lipfast.reference.chain_quadratic import (
    _evaluated,
    chain_quadratic,
    closed_form,
    is_proved,
    scaled_chain,
    sweep,
)

_BOXES = {"relu": (0.0, 1.0), "gelu": (-0.1289, 1.1289), "abs": (-1.0, 1.0), "steep": (0.5, 2.0)}


def _weights(sizes: Sequence[int], seed: int, decades: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, columns in zip(sizes[1:], sizes[:-1], strict=True):
        scale = 10.0 ** (decades * torch.randn(rows, 1, generator=generator, dtype=torch.float64))
        found.append(scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return found


def _constraints(sizes: Sequence[int], box: tuple[float, float]) -> tuple[list[Tensor], ...]:
    ends = [torch.tensor(end, dtype=torch.float64) for end in box]
    boxes = [boxes_of(*(end.expand(size) for end in ends)) for size in sizes[1:-1]]
    return [own.means for own in boxes], [own.products for own in boxes]


def _largest_corner(weights: Sequence[Tensor], box: tuple[float, float]) -> float:
    """The largest norm over all slopes at the ends of their range: where a convex function is."""
    units = [len(weight) for weight in weights[:-1]]
    largest = 0.0
    for corner in product(box, repeat=sum(units)):
        slopes = torch.split(torch.tensor(corner, dtype=torch.float64), units)
        total = weights[0]
        for weight, own in zip(weights[1:], slopes, strict=True):
            total = weight @ (own[:, None] * total)
        largest = max(largest, float(torch.linalg.matrix_norm(total, 2)))
    return largest


@pytest.mark.parametrize("box", _BOXES.values(), ids=_BOXES)
@pytest.mark.parametrize("sizes", [(3, 4, 2), (2, 3, 3, 1), (1, 2, 2, 2, 2)])
def test_between_the_largest_corner_and_the_product(
    sizes: tuple[int, ...], box: tuple[float, float]
) -> None:
    for seed in range(3):
        weights = _weights(sizes, seed, decades=1.0)
        found = math.exp(chain_quadratic(weights, *_constraints(sizes, box)).log_value)
        truth = _largest_corner(weights, box)
        norms = math.prod(float(torch.linalg.matrix_norm(weight, 2)) for weight in weights)
        assert truth * (1 - 1e-13) <= found <= 1.35 * truth
        assert found <= norms * max(map(abs, box)) ** (len(sizes) - 2) * (1 + 1e-8)


def test_the_gradient_is_that_of_the_smoothed_maximum() -> None:
    sizes = (4, 6, 5, 3)
    chain = scaled_chain(_weights(sizes, 0), *_constraints(sizes, _BOXES["gelu"]))
    logs = torch.cat(closed_form(chain)).log() + 0.1
    point = _evaluated(chain, logs, 16)
    assert point is not None
    for unit in range(0, len(logs), 3):
        values = []
        for step in (1e-5, -1e-5):
            moved = logs.clone()
            moved[unit] += step
            other = _evaluated(chain, moved, 16)
            assert other is not None
            values.append(other.value)
        slope = (values[0] - values[1]) / 2e-5
        assert float(point.gradient[unit]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_a_rescaling_of_units_changes_nothing() -> None:
    sizes = (5, 8, 8, 3)
    weights, constraints = _weights(sizes, 1), _constraints(sizes, _BOXES["relu"])
    generator = torch.Generator().manual_seed(0)
    scales = [
        2.0 ** torch.randint(-20, 20, (size,), generator=generator).double() for size in sizes[1:-1]
    ]
    other = [w.clone() for w in weights]
    for layer, scale in enumerate(scales):
        other[layer] *= scale[:, None]
        other[layer + 1] /= scale
    found = [chain_quadratic(own, *constraints).log_value for own in (weights, other)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    "case", ["zero row", "zero column", "zero weight", "known slopes", "one unit", "sign"]
)
def test_degenerate_chains_have_a_bound(case: str) -> None:
    sizes, box = (2, 3, 3, 2), (0.0, 1.0)
    if case == "one unit":
        sizes = (1, 1, 1, 1)
    weights = _weights(sizes, 2)
    if case == "zero row":
        weights[0][1] = 0
    if case == "zero column":
        weights[2][:, 0] = 0
    if case == "zero weight":
        weights[1][:] = 0
    if case in ("known slopes", "sign"):
        box = (1.0, 1.0) if case == "known slopes" else (-1.0, 1.0)
    found = math.exp(chain_quadratic(weights, *_constraints(sizes, box)).log_value)
    truth = _largest_corner(weights, box)
    assert truth * (1 - 1e-13) <= found <= 1.2 * truth + 1e-20


def test_errors_of_weights_are_in_the_bound() -> None:
    """The weights that are meant are anywhere within the errors of those that are given."""
    sizes, box = (2, 3, 3, 1), (0.0, 1.0)
    weights = _weights(sizes, 3)
    errors = [1e-3 * weight.abs() for weight in weights]
    found = math.exp(chain_quadratic(weights, *_constraints(sizes, box), errors=errors).log_value)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        signs = [torch.randn(w.shape, generator=generator).sign() for w in weights]
        meant = [w + s * e for w, s, e in zip(weights, signs, errors, strict=True)]
        assert _largest_corner(meant, box) <= found


def test_a_square_below_the_optimum_is_refused() -> None:
    sizes = (3, 5, 4, 2)
    found = chain_quadratic(_weights(sizes, 4), *_constraints(sizes, _BOXES["gelu"]))
    last = sweep(found.chain, found.multipliers)
    assert last is not None
    optimum = float(torch.linalg.eigvalsh(last.last)[-1])
    assert is_proved(found.chain, found.multipliers, found.square)
    assert not is_proved(found.chain, found.multipliers, optimum * (1 - 1e-12))
    assert not is_proved(found.chain, [-d for d in found.multipliers], found.square)
    assert not is_proved(found.chain, [d * torch.nan for d in found.multipliers], found.square)


def test_what_is_proved_is_positive_in_exact_arithmetic() -> None:
    """LDL^T of the whole matrix in fractions, m and p as they are."""
    sizes = (2, 3, 3, 2)
    found = chain_quadratic(_weights(sizes, 5, 1.0), *_constraints(sizes, _BOXES["gelu"]))
    chain = found.chain
    exact = [[[Fraction(x) for x in row] for row in w.tolist()] for w in chain.weights]
    d = [[Fraction(x) for x in own.tolist()] for own in found.multipliers]
    d.append([Fraction(found.square)] * sizes[-1])
    means, products = (
        [[Fraction(x) for x in own.tolist()] for own in both]
        for both in (chain.means, chain.products)
    )
    size = sum(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    matrix = [[Fraction(int(i == j and i < sizes[0])) for j in range(size)] for i in range(size)]
    for layer, weight in enumerate(exact):
        row0, column0 = starts[layer + 1], starts[layer]
        for j, row in enumerate(weight):
            matrix[row0 + j][row0 + j] += d[layer][j]
            for k, entry in enumerate(row):
                scale = Fraction(1) if layer == 0 else means[layer - 1][k] * d[layer - 1][k]
                matrix[row0 + j][column0 + k] = matrix[column0 + k][row0 + j] = entry * scale
                if layer == 0:
                    continue
                own = products[layer - 1][k] * d[layer - 1][k] * entry
                for i, other in enumerate(weight):
                    matrix[row0 + i][row0 + j] += own * other[k]
    for pivot in range(size):
        assert matrix[pivot][pivot] > 0
        for i in range(pivot + 1, size):
            factor = matrix[i][pivot] / matrix[pivot][pivot]
            for j in range(pivot + 1, size):
                matrix[i][j] -= factor * matrix[pivot][j]

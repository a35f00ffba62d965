"""Bounds by quadratic constraints are never below what slopes reach, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from mpmath import mp
from torch import Tensor

from lipfast.estimators.upper.quadratic.boxes import boxes_of
from lipfast.ops.chain_quadratic import ChainQuadratic, chain_quadratic
from tests.ops.test_chain_quadratic import BOXES
from tests.support.rationals import (
    Matrix,
    chain_form,
    is_positive,
    rational,
    scaled_rows,
    times,
    transposed,
)

SIZES = [(2, 3, 2), (1, 2, 2, 1), (3, 2, 3, 1), (2, 1, 1, 1, 2), (1, 6, 1), (4, 3, 3)]
RANGES = [*BOXES.values(), (0.25, 0.25), (-3.0, -1.0), (0.01, 1.0)]


def generated(sizes: Sequence[int], rng: np.random.Generator, decades: float) -> list[np.ndarray]:
    """Random weights over many orders of magnitude, with zero rows, dead units and zero entries."""
    found = []
    for rows, columns in zip(sizes[1:], sizes[:-1], strict=True):
        scale = 10.0 ** rng.uniform(-decades, decades, (rows, columns))
        weight = rng.standard_normal((rows, columns)) * scale
        weight[rng.random((rows, columns)) < 0.1] = 0
        if rng.random() < 0.2:
            weight[rng.integers(rows)] = 0
        found.append(weight)
    return found


def ranges_of(sizes: Sequence[int], box: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The ends of the slopes of every hidden unit, (n_i, 2)."""
    return [
        np.array(
            [RANGES[rng.integers(len(RANGES))] if box == "mixed" else BOXES[box] for _ in range(n)]
        )
        for n in sizes[1:-1]
    ]


def bounded(
    networks: Sequence[Sequence[np.ndarray]],
    ranges: Sequence[Sequence[np.ndarray]],
    dtype: torch.dtype = torch.float64,
    evaluations: int = 10,
) -> tuple[ChainQuadratic, list[Tensor], list[Tensor]]:
    """Bounds of all networks in one call, and the constraints of each hidden layer."""
    weights = [[torch.from_numpy(weight).to(dtype) for weight in own] for own in networks]
    boxes = [
        boxes_of(*torch.from_numpy(np.stack(layer)).unbind(2))
        for layer in zip(*ranges, strict=True)
    ]
    means, products = [own.means for own in boxes], [own.products for own in boxes]
    return chain_quadratic(weights, means, products, evaluations=evaluations), means, products


def corner_jacobian(weights: Sequence[Matrix], slopes: Sequence[float]) -> Matrix:
    total, rest = weights[0], list(slopes)
    for weight in weights[1:]:
        own, rest = rest[: len(total)], rest[len(total) :]
        total = times(weight, scaled_rows([Fraction(slope) for slope in own], total))
    return total


def worst_corner(weights: Sequence[np.ndarray], ranges: Sequence[np.ndarray]) -> tuple[float, ...]:
    """Of all slopes at ends of their ranges those with the largest norm, in floating point."""
    corners = np.array(list(product(*np.concatenate(ranges))))
    total, begin = np.broadcast_to(weights[0], (len(corners), *weights[0].shape)), 0
    for weight in weights[1:]:
        slopes = corners[:, begin : begin + total.shape[1], None]
        begin += total.shape[1]
        total = weight @ (slopes * total)
    return tuple(corners[np.linalg.norm(total, 2, axis=(1, 2)).argmax()])


def is_below(value: float, weights: Sequence[np.ndarray], ranges: Sequence[np.ndarray]) -> bool:
    """Whether the norm at the worst corner is larger than a value, exactly."""
    jacobian = corner_jacobian([rational(w) for w in weights], worst_corner(weights, ranges))
    form = times(jacobian, transposed(jacobian))
    square = Fraction(value) ** 2
    difference = [
        [(square if j == k else 0) - entry for k, entry in enumerate(row)]
        for j, row in enumerate(form)
    ]
    return not is_positive(difference)


def check_never_below(
    sizes: Sequence[int],
    box: str,
    count: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
    *,
    evaluations: int = 10,
) -> None:
    rng = np.random.default_rng(seed)
    networks = [generated(sizes, rng, rng.choice([0, 1, 3, 12])) for _ in range(count)]
    networks = [
        [torch.from_numpy(weight).to(dtype).double().numpy() for weight in own] for own in networks
    ]
    ranges = [ranges_of(sizes, box, rng) for _ in range(count)]
    found, *_ = bounded(networks, ranges, dtype, evaluations)
    for value, weights, ends in zip(found.values.tolist(), networks, ranges, strict=True):
        assert np.isfinite(value)
        assert not is_below(value, weights, ends)


@pytest.mark.parametrize("box", [*BOXES, "mixed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_never_below_any_slopes(capability: str, sizes: tuple[int, ...], box: str) -> None:
    check_never_below(sizes, box, 3, 0)
    check_never_below(sizes, box, 3, 5, evaluations=1)


@pytest.mark.long
@pytest.mark.parametrize("box", [*BOXES, "mixed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_never_below_any_slopes_of_many(capability: str, sizes: tuple[int, ...], box: str) -> None:
    check_never_below(sizes, box, 70, 1)
    check_never_below(sizes, box, 30, 2, torch.float32)
    check_never_below(sizes, box, 30, 6, evaluations=1)


def check_proved_matrices(
    sizes: Sequence[int], box: str, count: int, seed: int, evaluations: int = 10
) -> None:
    """The matrix of every certificate, with the scaled weights, is positive semidefinite."""
    rng = np.random.default_rng(seed)
    networks = [generated(sizes, rng, rng.choice([0, 1, 3])) for _ in range(count)]
    ranges = [ranges_of(sizes, box, rng) for _ in range(count)]
    found, means, products = bounded(networks, ranges, evaluations=evaluations)
    for n, weights in enumerate(networks):
        exponents = [own[n].tolist() for own in found.unit_exponents]
        exponents = [[0] * sizes[0], *exponents, [0] * sizes[-1]]
        shifts = found.weight_exponents[n].tolist()
        scaled = [
            [
                [Fraction(2) ** (after[j] - before[k] - s) * value for k, value in enumerate(row)]
                for j, row in enumerate(rational(weight))
            ]
            for weight, before, after, s in zip(
                weights, exponents[:-1], exponents[1:], shifts, strict=True
            )
        ]
        exact = [
            [[Fraction(value) for value in layer[n].tolist()] for layer in layers]
            for layers in (means, products, found.multipliers)
        ]
        square = Fraction(found.squares[n].item())
        assert is_positive(chain_form(scaled, *exact, square))
        with mp.workdps(60):
            rho = mp.sqrt(mp.mpf(found.squares[n].item())) * mp.mpf(2) ** sum(shifts)
            assert mp.mpf(found.values[n].item()) >= rho
            assert mp.mpf(found.log_values[n].item()) >= mp.log(rho)


@pytest.mark.parametrize("box", [*BOXES, "mixed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_proved_is_true(sizes: tuple[int, ...], box: str) -> None:
    check_proved_matrices(sizes, box, 3, 3)
    check_proved_matrices(sizes, box, 3, 7, evaluations=1)


@pytest.mark.long
@pytest.mark.parametrize("box", [*BOXES, "mixed"])
@pytest.mark.parametrize("sizes", [*SIZES, (7, 9, 8, 3)], ids=str)
def test_what_is_proved_of_many_is_true(sizes: tuple[int, ...], box: str) -> None:
    check_proved_matrices(sizes, box, 60, 4)
    check_proved_matrices(sizes, box, 60, 8, evaluations=1)


@pytest.mark.parametrize("box", ["relu", "gelu", "steep"])
def test_all_weights_within_the_errors(capability: str, box: str) -> None:
    """Weights at the ends of their errors, whose signs make the norm at a corner grow most."""
    sizes, rng = (3, 4, 3, 2), np.random.default_rng(5)
    for size in (1e-9, 1e-3, 0.1):
        weights = generated(sizes, rng, 0.5)
        errors = [size * np.abs(weight) * rng.random(weight.shape) for weight in weights]
        ranges = ranges_of(sizes, box, rng)
        boxes = [boxes_of(*torch.from_numpy(ends).unbind(1)) for ends in ranges]
        found = chain_quadratic(
            [[torch.from_numpy(weight) for weight in weights]],
            [own.means for own in boxes],
            [own.products for own in boxes],
            errors=[[torch.from_numpy(error) for error in errors]],
        )
        moved = worst_within(weights, errors, ranges)
        assert not is_below(found.values.item(), moved, ranges)


def worst_within(
    weights: Sequence[np.ndarray], errors: Sequence[np.ndarray], ranges: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The weights moved by their errors along the gradient of the norm at the worst corner."""
    corner = worst_corner(weights, ranges)
    slopes = np.split(np.array(corner), np.cumsum([len(ends) for ends in ranges])[:-1])
    moved = []
    for index in range(len(weights)):
        before = np.eye(weights[0].shape[1])
        for weight, slope in zip(weights[:index], slopes, strict=False):
            before = slope[:, None] * (weight @ before)
        after = np.eye(len(weights[-1]))
        for i in range(len(weights) - 1, index, -1):
            after = (after @ weights[i]) * slopes[i - 1]
        u, _, v = np.linalg.svd(after @ weights[index] @ before)
        gradient = np.outer(after.T @ u[:, 0], before @ v[0])
        moved.append(weights[index] + 0.999999 * errors[index] * np.sign(gradient))
    return moved

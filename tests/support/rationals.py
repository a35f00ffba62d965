"""Small matrices of rational numbers: sums, products and definiteness without any rounding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Matrix = list[list[Fraction]]


def rational(array: np.ndarray) -> Matrix:
    """The exact values of a float matrix."""
    return [[Fraction(float(value)) for value in row] for row in array]


def transposed(a: Matrix) -> Matrix:
    return [list(row) for row in zip(*a, strict=True)]


def times(a: Matrix, b: Matrix) -> Matrix:
    columns = transposed(b)
    return [[sum(map(_product, row, column), Fraction(0)) for column in columns] for row in a]


def _product(x: Fraction, y: Fraction) -> Fraction:
    return x * y


def scaled_rows(factors: Sequence[Fraction], a: Matrix) -> Matrix:
    """diag(factors) A"""
    return [[factor * value for value in row] for factor, row in zip(factors, a, strict=True)]


def is_positive(a: Matrix) -> bool:
    """Whether a symmetric matrix is positive semidefinite, by elimination."""
    a = [list(row) for row in a]
    while a:
        (pivot, *first), *rest = a
        if pivot < 0 or (pivot == 0 and any(first)):
            return False
        a = [
            [
                value - row[0] * other / pivot if pivot else value
                for value, other in zip(row[1:], first, strict=True)
            ]
            for row in rest
        ]
    return True


def chain_form(
    weights: Sequence[Matrix],
    means: Sequence[Sequence[Fraction]],
    products: Sequence[Sequence[Fraction]],
    multipliers: Sequence[Sequence[Fraction]],
    square: Fraction,
) -> Matrix:
    """The block tridiagonal matrix of a chain's quadratic constraints, less the inputs' block.

    Positive semidefinite: rho^2 = `square` is proved.
    """
    sizes = [len(weight) for weight in weights]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    a = [[Fraction(0)] * sum(sizes) for _ in range(sum(sizes))]
    for i, (weight, start) in enumerate(zip(weights, starts, strict=True)):
        own = multipliers[i] if i < len(multipliers) else [square] * sizes[i]
        for j, value in enumerate(own):
            a[start + j][start + j] = Fraction(value)
        if i == 0:
            block, sign = times(weight, transposed(weight)), -1
        else:
            bent = [p * d for p, d in zip(products[i - 1], multipliers[i - 1], strict=True)]
            block, sign = times(weight, scaled_rows(bent, transposed(weight))), 1
            before = starts[i - 1]
            for j, row in enumerate(weight):
                for k, value in enumerate(row):
                    entry = value * means[i - 1][k] * multipliers[i - 1][k]
                    a[start + j][before + k] = a[before + k][start + j] = entry
        for j, row in enumerate(block):
            for k, value in enumerate(row):
                a[start + j][start + k] += sign * value
    return a

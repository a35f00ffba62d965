"""Matrix functions without a look: inside their errors, in 40 digits, for many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from lipfast.plan.matrix_errors import exponential, householder_product, linalg_solve
from lipfast.plan.matrix_errors_together import (
    exponentials,
    frobenius_norms,
    householder_products,
    solved,
)
from lipfast.plan.parameter_rules import Enclosure

_Function = Callable[..., Enclosure]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def skew(count: int, side: int, size: float) -> Tensor:
    below = normal(count, side, side).tril(-1) * size
    return below - below.mT


def mapped(function: _Function, *operands: Tensor, errors: Tensor | None = None) -> Enclosure:
    """Of many matrices under vmap; with errors of the first operands."""

    def one(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        first = Enclosure(tensors[0], None if errors is None else errors)
        found = function(first, *(Enclosure(tensor) for tensor in tensors[1:]))
        return found.tensor, found.radius

    return Enclosure(*torch.func.vmap(one)(*operands))


def exactly(matrix: Tensor) -> Any:
    return mpmath.matrix([[mpmath.mpf(float(entry)) for entry in row] for row in matrix])


def reflected(a: Tensor, tau: Tensor) -> Any:
    rows, columns = a.shape
    result = mpmath.eye(rows)
    for index in range(len(tau)):
        v = mpmath.matrix([0] * index + [1] + [float(entry) for entry in a[index + 1 :, index]])
        result = result * (mpmath.eye(rows) - mpmath.mpf(float(tau[index])) * v * v.T)
    return result[:, :columns]


def check(found: Enclosure, truths: list[Any], most: float) -> None:
    """Every entry is within its bound of the truth, and the bounds are small."""
    for tensor, error, truth in zip(found.tensor, found.radius, truths, strict=True):
        for row in range(tensor.shape[0]):
            for column in range(tensor.shape[1]):
                off = abs(truth[row, column] - mpmath.mpf(float(tensor[row, column])))
                assert off <= mpmath.mpf(float(error[row, column]))
    assert 0 < float(found.radius.max()) <= most


@pytest.mark.parametrize("size", [1e-9, 0.1, 1.0, 30.0])
def test_exponentials_of_skew_matrices(size: float) -> None:
    a = skew(3, 4, size)
    with mpmath.workdps(40):
        truths = [mpmath.expm(exactly(matrix)) for matrix in a]
        check(mapped(exponentials, a), truths, 1e-11)
        check(exponentials(Enclosure(a)), truths, 1e-11)
    known = [float(exponential(Enclosure(matrix)).radius.max()) for matrix in a]
    assert float(exponentials(Enclosure(a)).radius.max()) <= 10 * max(known) + 1e-13


def test_exponentials_of_any_matrices() -> None:
    a = torch.cat([normal(2, 3, 3), 3 * normal(1, 3, 3, seed=1), torch.zeros(1, 3, 3).double()])
    with mpmath.workdps(40):
        check(mapped(exponentials, a), [mpmath.expm(exactly(matrix)) for matrix in a], 1e-4)


def test_exponentials_of_rounded_matrices() -> None:
    a, errors = skew(2, 3, 1.0), torch.full((3, 3), 1e-9, dtype=torch.float64)
    found = mapped(exponentials, a, errors=errors)
    moved = a + 0.99e-9 * normal(2, 3, 3, seed=5).sign()
    with mpmath.workdps(40):
        check(found, [mpmath.expm(exactly(matrix)) for matrix in moved], 1e-5)
    assert float(found.radius.min()) > 1e-9


def test_what_takes_a_look_is_infinite() -> None:
    a = skew(4, 3, 1.0)
    a[1] *= 1e5
    a[2, 0, 1] = math.nan
    a[3, 0, 1] = math.inf
    errors = mapped(exponentials, a).radius.amax((1, 2))
    assert errors[0] < 1e-12 and errors[1:].tolist() == [math.inf] * 3
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double()
    matrices = torch.stack([torch.eye(2).double(), singular, singular * math.nan])
    errors = mapped(solved, matrices, torch.ones(3, 2, 2).double()).radius.amax((1, 2))
    assert errors[0] < 1e-13 and errors[1:].tolist() == [math.inf] * 2


@pytest.mark.parametrize("left", [True, False])
def test_solutions(left: bool) -> None:
    m, b = torch.eye(4).double() + skew(3, 4, 2.0), normal(3, 4, 4, seed=1)

    def function(first: Enclosure, second: Enclosure) -> Enclosure:
        return solved(first, second, left=left)

    with mpmath.workdps(40):
        inverses = [exactly(matrix) ** -1 for matrix in m]
        truths = [
            inverse * exactly(matrix) if left else exactly(matrix) * inverse
            for inverse, matrix in zip(inverses, b, strict=True)
        ]
        check(mapped(function, m, b), truths, 1e-10)
    known = linalg_solve(Enclosure(m[0]), Enclosure(b[0]), left=left)
    torch.testing.assert_close(mapped(function, m, b).radius[0], known.radius, rtol=0.1, atol=0)


def test_solutions_with_vectors() -> None:
    m, b = torch.eye(3).double() + skew(2, 3, 1.0), normal(2, 3)
    found = mapped(solved, m, b)
    assert found.tensor.shape == (2, 3)
    torch.testing.assert_close((m @ found.tensor[..., None])[..., 0], b)


@pytest.mark.parametrize("shape", [(4, 4, 4), (6, 3, 3), (5, 4, 2), (1, 1, 1)], ids=str)
def test_householder_products(shape: tuple[int, int, int]) -> None:
    """Rows, columns, reflections; the entries on and above the diagonal are not read."""
    rows, columns, count = shape
    a, tau = normal(3, rows, columns), normal(3, count, seed=1)
    tau[0] = 2 / (1 + a[0].tril(-1)[:, :count].square().sum(0))
    tau[1, 0] = 0.0
    with mpmath.workdps(40):
        truths = [reflected(*pair) for pair in zip(a, tau, strict=True)]
        check(mapped(householder_products, a, tau), truths, 1e-9)
    known = householder_product(Enclosure(a), Enclosure(tau))
    torch.testing.assert_close(mapped(householder_products, a, tau).tensor, known.tensor)


def test_norms_are_rounded_up() -> None:
    matrices = torch.stack([normal(3, 4), 1e-300 * normal(3, 4, seed=1), torch.zeros(3, 4)])
    matrices = matrices.double()
    with mpmath.workdps(40):
        for matrix, found in zip(matrices, frobenius_norms(matrices).flatten(), strict=True):
            truth = mpmath.sqrt(sum(entry**2 for entry in exactly(matrix)))
            assert mpmath.mpf(float(found)) >= truth
    assert frobenius_norms(torch.zeros(2, 0, 3)).tolist() == [[[0.0]], [[0.0]]]

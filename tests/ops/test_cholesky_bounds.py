"""Bounds from factors: true of any factor, tight of Cholesky's, and as an op of torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.cholesky_bounds import cholesky_bounds
from lipfast.ops.shifted_grams import shifted_grams
from lipfast.reference import cholesky_bounds as reference
from tests.support.exact_norms import any_known, assert_known


def certificate(matrices: Tensor, lower: Tensor) -> tuple[Tensor, ...]:
    grams, scales, shifts = shifted_grams(matrices, lower, excess=1e-6)
    factors, failures = torch.linalg.cholesky_ex(grams)
    return factors, failures, scales, shifts


def test_never_below_known_norms() -> None:
    generator = torch.Generator().manual_seed(3)
    for known in [any_known(generator, largest=5) for _ in range(80)]:
        for matrix in (known.matrix, known.matrix.mT):
            near = torch.linalg.matrix_norm(matrix.double(), 2)[None] * (1 - 1e-9)
            found = cholesky_bounds(matrix[None], *certificate(matrix[None], near))
            assert_known(known, 0.0, float(found))


@pytest.mark.parametrize("kind", ["zero", "random", "exact"])
def test_against_the_reference(kind: str) -> None:
    torch.manual_seed(1)
    matrices = torch.randn(3, 5, 6)
    truth = torch.linalg.matrix_norm(matrices.double(), 2)
    factors, failures, *rest = certificate(matrices, truth)
    if kind != "exact":
        factors = torch.zeros_like(factors) if kind == "zero" else torch.randn_like(factors)
    found = cholesky_bounds(matrices, factors, failures, *rest)
    known = reference.cholesky_bounds(matrices, factors, failures, *rest)
    torch.testing.assert_close(found, known, rtol=1e-5, atol=0)
    assert bool((truth <= found).all())


def test_failures_and_nan_prove_nothing() -> None:
    matrices = torch.randn(2, 3, 4)
    factors, failures, *rest = certificate(matrices, torch.linalg.matrix_norm(matrices.double(), 2))
    failures[0], factors[1, 2, 1] = 2, math.nan
    assert cholesky_bounds(matrices, factors, failures, *rest).tolist() == [math.inf, math.inf]


def test_as_an_op_of_torch() -> None:
    matrices = torch.randn(2, 3, 4)
    given = certificate(matrices, torch.linalg.matrix_norm(matrices.double(), 2))
    checks = ("test_schema", "test_faketensor")
    arguments = matrices, *given, 1e-15, 1.0
    torch.library.opcheck(torch.ops.lipfast.cholesky_bounds.default, arguments, test_utils=checks)


def test_sums_too_long_are_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    long, factor = torch.ones(1, 1, 1).expand(1, 1, 2**30 - 2), one.reshape(1, 1, 1)
    with pytest.raises(ArgumentError, match=r"matrices: sums of 1073741824 .* fewer than 2\^30"):
        cholesky_bounds(long, factor, torch.zeros(1, dtype=torch.int32), one, one)

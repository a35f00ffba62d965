"""Tests of the norms that every bound takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lipfast
from lipfast.errors import ArgumentError
from lipfast.norms import check_norm, dual_norm
from lipfast.ops.jacobian_reduction import RowReduction, operator_norms

SPELLINGS = [1, 1.0, 2, 2.0, np.int64(2), math.inf, np.float64(math.inf), "inf"]


@pytest.mark.parametrize("given", SPELLINGS, ids=repr)
def test_spellings(given: float | str) -> None:
    norm = check_norm(given)
    assert norm == float(given)
    assert isinstance(norm, float if norm == math.inf else int)


@pytest.mark.parametrize("bad", [0, 3, -math.inf, math.nan, "two", "2", None, [2], torch.ones(2)])
def test_anything_else_is_an_error(bad: object) -> None:
    with pytest.raises(ArgumentError, match="norm must be 1, 2 or inf"):
        check_norm(bad)


def test_a_dual_norm_is_the_norm_of_the_transpose() -> None:
    matrix = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, -1.0]], dtype=torch.float64)
    for norm in (1, 2, math.inf):
        transposed = torch.linalg.matrix_norm(matrix.T, norm)
        torch.testing.assert_close(torch.linalg.matrix_norm(matrix, dual_norm(norm)), transposed)


def test_ops_and_bounds_take_inf_by_its_name() -> None:
    matrix = torch.tensor([[3.0, -1.0], [0.0, 4.0]])
    norms = lipfast.spectral_norms([matrix], norm="inf")
    assert torch.equal(norms.upper, lipfast.spectral_norms([matrix], norm=math.inf).upper)
    assert operator_norms(matrix[None], "inf").tolist() == [4.0]
    rows = RowReduction(1, 2, 2)
    rows.add(matrix[None])
    assert rows.norms("inf").tolist() == [4.0]
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(matrix)
    x = torch.ones(1, 2)
    assert lipfast.jacobian_norms(model, x, norm="inf").tolist() == [4.0]
    assert lipfast.upper_bound(model, x, norm="inf").value >= 4.0

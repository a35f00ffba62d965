"""What factorisations are of: B, t and t I - B B^T against the reference, and as an op of torch."""

from __future__ import annotations

import pytest
import torch

from lipfast.ops.shifted_grams import shifted_grams
from lipfast.reference import shifted_grams as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-600, 0, 100])
def test_against_the_reference(dtype: torch.dtype, power: int) -> None:
    torch.manual_seed(0)
    matrices = (torch.randn(3, 4, 7, dtype=torch.float64) * 2.0**power).to(dtype)
    lower = torch.linalg.matrix_norm(matrices.double(), 2)
    for given in (matrices, matrices.mT.contiguous().mT):
        grams, scales, shifts = shifted_grams(given, lower, excess=1e-3)
        known = reference.shifted_grams(matrices, lower, excess=1e-3)
        assert torch.equal(scales, known[1])
        torch.testing.assert_close(shifts, known[2], rtol=1e-15, atol=0)
        torch.testing.assert_close(grams, known[0], rtol=1e-12, atol=1e-14)
        if bool((lower > 0).all()):
            assert bool((torch.linalg.eigvalsh(grams) > 0).all())


def test_as_an_op_of_torch() -> None:
    arguments = torch.randn(2, 3, 4), torch.ones(2, dtype=torch.float64), 1e-6
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lipfast.shifted_grams.default, arguments, test_utils=checks)

from __future__ import annotations

import math

import pytest
import torch

from lipfast.errors import ArgumentError
from lipfast.ops.cholesky_residual import cholesky_residual
from lipfast.reference.cholesky_residual import cholesky_residual as reference

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(batch: int, side: int, length: int) -> Case:
    generator = torch.Generator().manual_seed(batch + side + length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return draw(batch, side, length), draw(batch, side, side), draw(batch)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 9), (2, 40, 33), (0, 3, 4)], ids=str)
def test_matches_the_reference(shape: tuple[int, int, int]) -> None:
    matrices, factors, shifts = case(*shape)
    torch.testing.assert_close(
        cholesky_residual(matrices, factors, shifts),
        reference(matrices, factors, shifts),
        rtol=1e-13,
        atol=0,
    )


def test_the_upper_triangle_is_not_read() -> None:
    matrices, factors, shifts = case(2, 4, 6)
    spoilt = factors + torch.triu(torch.full_like(factors, math.nan), 1)
    expected = cholesky_residual(matrices, factors, shifts)
    assert torch.equal(cholesky_residual(matrices, spoilt, shifts), expected)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.lipfast.cholesky_residual.default, case(2, 3, 4))


def test_bad_input() -> None:
    matrices, factors, shifts = case(2, 3, 4)
    bad = [
        (matrices.float(), factors, shifts, "matrices: expected float64"),
        (matrices[0], factors, shifts, "matrices: expected 3 dimensions"),
        (matrices, factors[:, :2], shifts, r"expected factors \(2, 3, 3\)"),
        (matrices, factors, shifts[:1], r"shifts \(2,\)"),
        (matrices[:, :0], factors, shifts, "empty"),
    ]
    for b, factor, shift, message in bad:
        with pytest.raises(ArgumentError, match=message):
            cholesky_residual(b, factor, shift)

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.hermitian_residual import hermitian_residual
from lipfast.reference.hermitian_residual import hermitian_residual as reference

Case = tuple[Tensor, Tensor, Tensor]


def case(batch: int, side: int, length: int) -> Case:
    generator = torch.Generator().manual_seed(batch + side + length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)

    return draw(batch, side, side), draw(batch, side, length), draw(batch, side, side)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 9), (2, 40, 0), (0, 3, 4)], ids=str)
def test_matches_the_reference(shape: tuple[int, int, int]) -> None:
    given = case(*shape)
    found, expected = hermitian_residual(*given), reference(*given)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_an_exact_factor_leaves_nothing() -> None:
    b = torch.tensor([[[1.0 + 2j, 0.0], [2.0, 1j]]], dtype=torch.complex128)
    factor = torch.tensor([[[3.0, 0.0], [1.0 - 1j, 2.0]]], dtype=torch.complex128)
    a = b @ b.mH + factor @ factor.mH
    assert hermitian_residual(a, b, factor).tolist() == [[0.0, 10.0 + 15.0]]
    a[0, 1, 0] += 3.0 + 4.0j
    assert hermitian_residual(a, b, factor).tolist() == [[2 * 25.0, 25.0]]


def test_upper_triangles_and_imaginary_diagonals_are_not_read() -> None:
    a, b, factor = case(2, 4, 6)
    expected = hermitian_residual(a, b, factor)
    above = torch.triu(torch.full_like(a, complex(math.nan, math.nan)), 1)
    other = a + above
    for imaginary in (3, 1e10, math.inf):
        other.diagonal(dim1=1, dim2=2).imag.fill_(imaginary)
        torch.testing.assert_close(hermitian_residual(other, b, factor + above), expected)


def test_conjugate_and_transposed_views_are_read_as_they_are() -> None:
    a, b, factor = case(2, 4, 6)
    expected = reference(a.conj(), b.mT.contiguous().mT, factor.mT)
    torch.testing.assert_close(
        hermitian_residual(a.conj(), b.mT.contiguous().mT, factor.mT), expected
    )


def test_opcheck() -> None:
    pairs = [torch.view_as_real(tensor) for tensor in case(2, 3, 4)]
    torch.library.opcheck(torch.ops.lipfast.hermitian_residual.default, pairs)


def test_bad_input() -> None:
    a, b, factor = case(2, 3, 4)
    bad = [
        (a.real, b, factor, "hermitian: expected complex128"),
        (a, b[0], factor, "matrices: expected complex128 with 3 dimensions"),
        (a, b, factor[:, :2], "of one shape"),
        (a[:, :, :2], b, factor[:, :, :2], "of one shape"),
        (a, b[:1], factor, r"matrices: expected \(2, 3, m\)"),
        (a, b[..., :1].expand(2, 3, 2**29), factor, r"matrices: sums of .* fewer than 2\^30"),
        (a, None, factor, "matrices: expected a torch.Tensor"),
    ]
    for *given, message in bad:
        with pytest.raises(ArgumentError, match=message):
            hermitian_residual(*given)  # type: ignore[arg-type]

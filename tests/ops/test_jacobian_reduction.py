from __future__ import annotations

import math

import pytest
import torch

from lipfast.errors import ArgumentError
from lipfast.ops.jacobian_reduction import RowReduction, jacobian_reduction, operator_norms
from lipfast.reference.jacobian_reduction import jacobian_reduction as reference
from lipfast.reference.jacobian_reduction import operator_norms as reference_norms

SHAPES = [
    (1, 1, 1),
    (5, 10, 40),
    (9, 3, 2),
    (2, 1, 50),
    (2, 50, 1),
    (7, 10, 784),
    (8, 40, 10),
    (3, 64, 65),
    (0, 3, 4),
]
LARGE = [(3, 65, 100), (2, 90, 70)]  # Lanczos
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(capability: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    jacobian = torch.randn(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    spectral, frobenius = jacobian_reduction(jacobian)
    assert spectral.dtype == frobenius.dtype == dtype
    truth = reference(jacobian)
    torch.testing.assert_close(spectral.double(), truth[0], rtol=TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(frobenius.double(), truth[1], rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_jacobians(capability: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    jacobian = torch.randn(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    spectral, frobenius = jacobian_reduction(jacobian)
    truth = reference(jacobian)
    torch.testing.assert_close(
        spectral.double(), truth[0], rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=0
    )
    torch.testing.assert_close(frobenius.double(), truth[1], rtol=TOLERANCE[dtype], atol=0)


def test_degenerate_spectra(capability: str, generator: torch.Generator) -> None:
    n = 12
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    double_top = torch.ones(n, dtype=torch.float64)
    double_top[2:] = 0.1
    cases = torch.stack(
        [
            torch.eye(n, dtype=torch.float64),
            torch.zeros(n, n, dtype=torch.float64),
            q,
            torch.ones(n, n, dtype=torch.float64),
            q @ torch.diag(double_top) @ q.T,
            torch.diag(1 + 1e-13 * torch.arange(n, dtype=torch.float64)),
            torch.diag(torch.arange(n, dtype=torch.float64)),
            torch.outer(q[0], q[1]),
            1e200 * q,
            1e-200 * q,
        ]
    )
    spectral, frobenius = jacobian_reduction(cases)
    truth = reference(cases)
    torch.testing.assert_close(spectral, truth[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(frobenius, truth[1], rtol=1e-13, atol=0)
    assert bool((spectral <= frobenius).all())


def test_two_by_two_is_exact_to_rounding(capability: str, generator: torch.Generator) -> None:
    jacobian = torch.randn(2000, 2, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        jacobian_reduction(jacobian)[0], reference(jacobian)[0], rtol=1e-13, atol=0
    )


def test_nan_stays_with_its_sample(capability: str, generator: torch.Generator) -> None:
    for outputs in (3, 70):
        jacobian = torch.randn(6, outputs, 80, generator=generator)
        jacobian[2, 1, 1] = math.nan
        spectral, frobenius = jacobian_reduction(jacobian)
        expected = [False, False, True, False, False, False]
        assert spectral.isnan().tolist() == frobenius.isnan().tolist() == expected


def test_independent_of_threads_and_slicing(capability: str, generator: torch.Generator) -> None:
    jacobian = torch.randn(37, 10, 40, generator=generator)
    threads = torch.get_num_threads()
    together = jacobian_reduction(jacobian)[0]
    try:
        torch.set_num_threads(1)
        assert torch.equal(jacobian_reduction(jacobian)[0], together)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(jacobian_reduction(jacobian[5:9])[0], together[5:9])


def test_opcheck(generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        jacobian = torch.randn(3, 4, 5, generator=generator, dtype=dtype)
        torch.library.opcheck(torch.ops.lipfast.jacobian_reduction.default, (jacobian,))


@pytest.mark.parametrize(
    "jacobian",
    [torch.ones(2, 2), torch.ones(2, 0, 3), torch.ones(1, 2, 2, dtype=torch.int32), None],
    ids=["2-D", "empty", "integer", "None"],
)
def test_bad_input(jacobian: object) -> None:
    with pytest.raises(ArgumentError, match="jacobian"):
        jacobian_reduction(jacobian)  # type: ignore[arg-type]


NORMS = [1, 2, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 10, 41), (3, 33, 7), (2, 70, 80)], ids=str)
def test_operator_norms_match_the_reference(
    capability: str, shape: tuple[int, ...], norm: float, dtype: torch.dtype
) -> None:
    jacobian = torch.randn(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    result = operator_norms(jacobian, norm)
    assert result.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        result.double(), reference_norms(jacobian, norm), rtol=tolerance, atol=0
    )


@pytest.mark.parametrize("block", [1, 3, 50])
@pytest.mark.parametrize("shape", [(3, 9, 40), (4, 30, 6), (2, 90, 70), (2, 70, 90), (2, 5, 5)])
def test_rows_in_blocks_match_the_reference(
    capability: str, shape: tuple[int, int, int], block: int, generator: torch.Generator
) -> None:
    jacobian = torch.randn(shape, generator=generator)
    reduction = RowReduction(*shape)
    for rows in jacobian.split(block, dim=1):
        reduction.add(rows)
    for norm in NORMS:
        torch.testing.assert_close(
            reduction.norms(norm).double(), reference_norms(jacobian, norm), rtol=2e-6, atol=0
        )
    torch.testing.assert_close(
        reduction.frobenius().double(), reference(jacobian)[1], rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("size", [1e-300, 1e200, 5e-324])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_of_extreme_size_do_not_overflow(size: float, order: tuple[int, int]) -> None:
    rows = torch.zeros(1, 2, 2, dtype=torch.float64)
    rows[0, 0, 0], rows[0, 1, 1] = size, 1.0
    reduction = RowReduction(1, 3, 2)  # more rows than columns: the Gram matrix is accumulated
    for position in order:
        reduction.add(rows[:, position : position + 1])
    reduction.add(torch.zeros(1, 1, 2, dtype=torch.float64))
    assert float(reduction.norms(2)) == pytest.approx(max(size, 1.0), rel=1e-14)
    assert float(reduction.frobenius()) == pytest.approx(max(size, 1.0), rel=1e-14)


def test_nan_in_a_row_stays_with_its_sample() -> None:
    reduction = RowReduction(2, 4, 3)
    rows = torch.ones(2, 4, 3)
    rows[1, 2, 0] = math.nan
    for row in rows.split(1, dim=1):
        reduction.add(row)
    for norms in (*(reduction.norms(norm) for norm in NORMS), reduction.frobenius()):
        assert norms.isnan().tolist() == [False, True]


def test_rows_that_do_not_fit_are_refused() -> None:
    reduction = RowReduction(2, 3, 4, spectral=False)
    with pytest.raises(ArgumentError, match=r"expected \(2, rows, 4\)"):
        reduction.add(torch.ones(2, 1, 5))
    reduction.add(torch.ones(2, 2, 4))
    with pytest.raises(ArgumentError, match="2 rows were given and 3 announced"):
        reduction.norms(1)
    with pytest.raises(ArgumentError, match="4 were given and 3 announced"):
        reduction.add(torch.ones(2, 2, 4))
    reduction = RowReduction(1, 1, 1, spectral=False)
    reduction.add(torch.ones(1, 1, 1))
    with pytest.raises(ArgumentError, match="spectral=True"):
        reduction.norms(2)
    with pytest.raises(ArgumentError, match="empty"):
        RowReduction(1, 0, 3)
    with pytest.raises(ArgumentError, match="empty"):
        operator_norms(torch.ones(1, 0, 3), 1)

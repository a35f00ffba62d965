from __future__ import annotations

import math

import pytest
import torch

from lipfast.errors import ArgumentError
from lipfast.ops.jacobian_reduction import jacobian_reduction
from lipfast.reference.jacobian_reduction import jacobian_reduction as reference

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

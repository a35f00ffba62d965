"""Every CUDA kernel body, run on the CPU, against lipfast.reference, at awkward sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lipfast.ops.chain_activations import ACTIVATIONS
from lipfast.ops.chain_stages import Activation, Linear, Stage
from lipfast.reference import chain_jacobian_norms as reference_chain
from lipfast.reference import cholesky_bounds as reference_bounds
from lipfast.reference import hermitian_residual as reference_hermitian
from lipfast.reference import jacobian_reduction as reference_reduction
from lipfast.reference import shifted_grams as reference_shifted
from lipfast.reference import symbol_grams as reference_grams
from lipfast.reference import tap_products as reference_products
from lipfast.rounding import WIDE, wide_gamma
from tests.support import kernels
from tests.support.harness import Harness

# Races are found under any order; the results of two kinds of orders are compared all the same.
ORDERS = (1, 2)
DTYPES = [torch.float32, torch.float64]
EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same_under_every_order(run: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results, which must not depend on the order in which threads run: not in one bit."""
    first = run(ORDERS[0])
    for order in ORDERS[1:]:
        for one, other in zip(first, run(order), strict=True):
            assert torch.equal(torch.nan_to_num(one, nan=-1.0), torch.nan_to_num(other, nan=-1.0))
    return first


# jacobian_reduction

JACOBIANS = [
    (1, 1, 1),
    (5, 10, 40),
    (9, 3, 2),
    (2, 1, 50),
    (2, 50, 1),
    (3, 31, 33),
    (2, 33, 32),
    (1, 33, 34),
    (1, 40, 70),
    (37, 4, 21),  # a warp takes eight of them, a block sixteen
    (3, 40, 9),
    (1, 16, 17),
    (0, 3, 4),
]
LARGE_JACOBIANS = [(3, 10, 784), (2, 64, 65), (2, 65, 70), (1, 130, 90)]


def check_reduction(harness: Harness, jacobian: Tensor, run: Callable[[int], object]) -> None:
    spectral, frobenius = same_under_every_order(run)  # type: ignore[arg-type]
    truth = reference_reduction.jacobian_reduction(jacobian)
    side = min(jacobian.shape[1:])
    # The contract: (D + K^2) u of float64 and one rounding to the type.
    tolerance = EPS[jacobian.dtype] + (max(jacobian.shape[1:]) + side * side + 8) * 2.0**-53
    torch.testing.assert_close(spectral.double(), truth[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(frobenius.double(), truth[1], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", JACOBIANS, ids=str)
def test_jacobian_reduction(checked: Harness, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    jacobian = normal(*shape, dtype=dtype)
    check_reduction(
        checked, jacobian, lambda order: kernels.jacobian_reduction(checked, jacobian, seed=order)
    )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE_JACOBIANS, ids=str)
def test_large_jacobians(checked: Harness, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    test_jacobian_reduction(checked, dtype, shape)


def test_jacobian_reduction_of_degenerate_spectra(checked: Harness) -> None:
    n = 6
    q = torch.linalg.qr(normal(n, n))[0]
    cases = torch.stack(
        [
            torch.eye(n, dtype=torch.float64),
            torch.zeros(n, n, dtype=torch.float64),
            torch.ones(n, n, dtype=torch.float64),
            torch.diag(1 + 1e-13 * torch.arange(n, dtype=torch.float64)),
            torch.outer(q[0], q[1]),
            1e200 * q,
            1e-200 * q,
        ]
    )
    spectral, frobenius = kernels.jacobian_reduction(checked, cases)
    truth = reference_reduction.jacobian_reduction(cases)
    torch.testing.assert_close(spectral, truth[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(frobenius, truth[1], rtol=1e-14, atol=0)
    assert bool((spectral <= frobenius).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_jacobian_reduction_keeps_bad_numbers_apart(checked: Harness, bad: float) -> None:
    jacobian = normal(3, 4, 5)
    jacobian[1, 2, 3] = bad
    spectral, frobenius = kernels.jacobian_reduction(checked, jacobian)
    assert spectral.isnan().tolist() == frobenius.isnan().tolist() == [False, True, False]


# spectral_norms


def spectral_matrices() -> list[Tensor]:
    shapes = [(1, 1), (1, 7), (7, 1), (31, 33), (33, 32), (64, 40), (10, 100), (50, 50)]
    return [
        normal(*shape, seed=seed, dtype=dtype)
        for dtype in DTYPES
        for seed, shape in enumerate(shapes)
    ]


def check_bracket(found: kernels.Spectral, matrices: list[Tensor], rtol: float) -> None:
    truth = [float(torch.linalg.svdvals(matrix.double())[0]) for matrix in matrices]
    slack = 64 * 2.0**-53  # of the SVD itself
    for index, matrix in enumerate(matrices):
        lower, upper = float(found.lower[index]), float(found.upper[index])
        assert lower <= truth[index] * (1 + slack)
        assert upper >= truth[index] * (1 - slack)
        assert lower >= truth[index] * (1 - rtol)
        assert abs(float(found.right[index].norm()) - 1) < 1e-12
        if truth[index] > 0:
            image = matrix.double() / matrix.double().abs().max() @ found.right[index]
            torch.testing.assert_close(image / image.norm(), found.left[index])


def test_spectral_norms(checked: Harness) -> None:
    matrices = spectral_matrices()

    def run(order: int) -> tuple[Tensor, ...]:
        found = kernels.spectral_norms(checked, matrices, seed=order)
        return found.lower, found.upper, found.passes, torch.cat(found.right)

    same_under_every_order(run)
    check_bracket(kernels.spectral_norms(checked, matrices), matrices, 1e-9)


def test_spectral_norms_do_not_depend_on_the_company_or_the_grid(checked: Harness) -> None:
    matrices = spectral_matrices()[3:6]
    together = kernels.spectral_norms(checked, matrices, grid=4)
    for index, matrix in enumerate(matrices):
        alone = kernels.spectral_norms(checked, [matrix], grid=1)
        assert torch.equal(alone.lower[0], together.lower[index])
        assert torch.equal(alone.upper[0], together.upper[index])
        assert torch.equal(alone.right[0], together.right[index])


def test_spectral_norms_of_extreme_matrices(checked: Harness) -> None:
    matrices = [
        torch.eye(5),
        torch.ones(4, 4) * 1e30,
        torch.full((3, 2), 1e-40),
        torch.ones(3, 3, dtype=torch.float64) * 1e300,
        torch.diag(torch.tensor([1.0, 1.0 - 1e-9, 0.5], dtype=torch.float64)),
    ]
    found = kernels.spectral_norms(checked, matrices)
    check_bracket(found, matrices, 1e-8)
    odd = [torch.zeros(3, 4), torch.full((2, 2), math.nan), torch.tensor([[1.0, -math.inf]])]
    found = kernels.spectral_norms(checked, odd)
    assert found.method.tolist() == [1, -1, -1]
    assert found.lower[0] == found.upper[0] == 0
    assert abs(float(found.right[0].norm()) - 1) < 1e-12
    assert abs(float(found.left[0].norm()) - 1) < 1e-12


def test_spectral_norms_start_where_they_are_told(checked: Harness) -> None:
    matrix = normal(40, 30)
    cold = kernels.spectral_norms(checked, [matrix])
    warm = kernels.spectral_norms(checked, [matrix], starts=[cold.right[0]])
    assert int(warm.passes) < int(cold.passes)
    check_bracket(warm, [matrix], 1e-9)
    # A singular vector of another value: a bound all the same, if a loose one.
    other = torch.linalg.svd(matrix)[2][1]
    check_bracket(kernels.spectral_norms(checked, [matrix], starts=[other]), [matrix], 0.1)
    zero = torch.zeros(30, dtype=torch.float64)
    check_bracket(kernels.spectral_norms(checked, [matrix], starts=[zero]), [matrix], 1e-9)


def test_spectral_norms_by_power_iteration(checked: Harness) -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    found = kernels.spectral_norms(checked, [matrix], power=True, certify=False, max_passes=30)
    assert found.passes.tolist() == [30]
    assert found.upper.tolist() == [math.inf]
    assert abs(float(found.lower) - 3) < 1e-8


def test_spectral_norms_of_many_matrices(checked: Harness) -> None:
    """More than one table of kernel arguments, and more matrices than blocks."""
    matrices = [normal(1 + index % 5, 1 + index % 7, seed=index) for index in range(90)]
    check_bracket(kernels.spectral_norms(checked, matrices, grid=2, block=32), matrices, 1e-9)


@pytest.mark.parametrize("shared", [0, 16000])
def test_spectral_norms_of_stacked_networks(checked: Harness, shared: int) -> None:
    """Matrices at equal distances, of shapes that repeat, are one table; others are as many."""
    singles, odd = torch.float32, [normal(2, 3), normal(4, 2)]
    networks = [
        [normal(5, 3, seed=i, dtype=singles), normal(3, 4, seed=i), normal(9, 5, seed=i)]
        for i in range(20)
    ]
    matrices = [matrix for network in networks for matrix in network]
    apart = kernels.spectral_norms(checked, matrices, resident_shared=shared, tolerance=1e-4)
    found = kernels.spectral_norms(
        checked, matrices, resident_shared=shared, tolerance=1e-4, together=True
    )
    assert found.tables == 1 <= apart.tables <= 3
    for name in ("lower", "upper", "passes", "method"):
        assert torch.equal(getattr(found, name), getattr(apart, name))
    assert all(map(torch.equal, found.right + found.left, apart.right + apart.left))
    # What does not repeat comes before, between and behind.
    mixed = [*odd, *matrices[:36], odd[0], *matrices[36:], *odd]
    parts = kernels.spectral_norms(
        checked, mixed, resident_shared=shared, tolerance=1e-4, together=True
    )
    assert 3 <= parts.tables <= 5
    assert torch.equal(parts.lower[2:38], found.lower[:36])
    assert torch.equal(parts.lower[39:-2], found.lower[36:])


@pytest.mark.long
def test_spectral_norms_restart_the_basis(checked: Harness) -> None:
    """A spectrum dense at the top and an error that is never small enough: the basis fills up."""
    n, basis = 130, 64  # SpectralPlan::add: vectors kept, of up to 2000 columns
    q = torch.linalg.qr(normal(n, n))[0]
    matrix = q * torch.linspace(1, 2, n, dtype=torch.float64) ** 0.05
    # Estimates of errors are not negative, so that none stops the search; nor does an invariant
    # subspace, as the 130 singular values are 2e-4 or more apart.
    passes = basis + 30
    found = kernels.spectral_norms(
        checked, [matrix], item_bytes=1 << 15, tolerance=-1.0, max_passes=passes
    )
    assert basis < int(found.passes) <= passes
    check_bracket(found, [matrix], 1e-8)


@pytest.mark.long
def test_rows_longer_than_shared_memory(checked: Harness) -> None:
    matrices = [normal(5, 9000, dtype=torch.float32), normal(3, 5000)]
    check_bracket(kernels.spectral_norms(checked, matrices, item_bytes=1 << 16), matrices, 1e-9)


# Of blocks that hold a matrix: all rows and the basis, some rows, two rows of the largest.
SHARED = {"all": 60000, "some": 16000}


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_spectral_norms_of_matrices_that_a_block_holds(checked: Harness, shared: int) -> None:
    matrices = [*spectral_matrices(), normal(20, 70), normal(19, 5, dtype=torch.float32)]

    def run(order: int) -> tuple[Tensor, ...]:
        found = kernels.spectral_norms(
            checked, matrices, seed=order, block=128, resident_shared=shared
        )
        return found.lower, found.upper, found.passes, torch.cat(found.right)

    same_under_every_order(run)
    found = kernels.spectral_norms(checked, matrices, block=128, resident_shared=shared)
    check_bracket(found, matrices, 1e-9)


def test_matrices_that_a_block_holds_do_not_depend_on_the_company(checked: Harness) -> None:
    matrices = spectral_matrices()[3:6]
    together = kernels.spectral_norms(checked, matrices, grid=2, resident_shared=SHARED["some"])
    for index, matrix in enumerate(matrices):
        alone = kernels.spectral_norms(checked, [matrix], grid=1, resident_shared=SHARED["some"])
        assert torch.equal(alone.lower[0], together.lower[index])
        assert torch.equal(alone.right[0], together.right[index])


def test_extreme_matrices_that_a_block_holds(checked: Harness) -> None:
    shared = SHARED["all"]
    matrices = [
        torch.full((3, 2), 1e-40),
        torch.ones(3, 3, dtype=torch.float64) * 1e300,
        torch.full((2, 3), 2.0**-1040, dtype=torch.float64),
    ]
    check_bracket(kernels.spectral_norms(checked, matrices, resident_shared=shared), matrices, 1e-8)
    odd = [torch.zeros(3, 4), torch.full((2, 2), math.nan), torch.tensor([[1.0, -math.inf]])]
    found = kernels.spectral_norms(checked, odd, resident_shared=shared)
    assert found.method.tolist() == [1, -1, -1] and found.lower[0] == found.upper[0] == 0
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    power = {"power": True, "certify": False, "max_passes": 30}
    found = kernels.spectral_norms(checked, [matrix], resident_shared=shared, **power)
    assert found.passes.tolist() == [30] and abs(float(found.lower) - 3) < 1e-8


def test_blocks_pass_over_matrices_that_they_do_not_hold(checked: Harness) -> None:
    # One column too many, of one and of two tiles of rows, and one that a block holds.
    matrices = [normal(1, 257), normal(18, 257), normal(2, 3)]
    found = kernels.spectral_norms(checked, matrices, grid=1, resident_shared=SHARED["all"])
    check_bracket(found, matrices, 1e-9)


@pytest.mark.long
def test_large_matrices_that_a_block_holds(checked: Harness) -> None:
    """More columns than two per lane, and both sizes of blocks."""
    matrices = [normal(40, 250, dtype=torch.float32), normal(120, 100), normal(33, 256)]
    found = kernels.spectral_norms(checked, matrices, block=128, resident_shared=30000)
    check_bracket(found, matrices, 1e-9)


# hermitian_residual


def complex_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.complex(normal(*shape, seed=2 * seed), normal(*shape, seed=2 * seed + 1))


HERMITIANS = [(2, 1, 1), (2, 33, 0), (1, 31, 33), (1, 70, 5)]


@pytest.mark.parametrize("shape", HERMITIANS, ids=str)
def test_hermitian_residual(checked: Harness, shape: tuple[int, int, int]) -> None:
    batch, side, _ = shape
    matrices = complex_normal(*shape)
    above = torch.triu(normal(side, side) * math.nan, 1)  # not to be read
    hermitian, factors = (complex_normal(batch, side, side, seed=seed) + above for seed in (1, 2))
    (partial,) = same_under_every_order(
        lambda order: (
            kernels.hermitian_residual(checked, hermitian, matrices, factors, seed=order),
        )
    )
    truth = reference_hermitian.hermitian_residual(hermitian, matrices, factors)
    torch.testing.assert_close(partial.sum(1), truth, rtol=1e-13, atol=0)


# tap_products, symbol_grams

# Symbols, taps per axis, rows and columns.
Kernels = tuple[int, tuple[int, int, int], int, int]
KERNELS: list[Kernels] = [
    *[(2, (1, 1, 1), 1, 1), (2, (3, 2, 1), 3, 18), (1, (2, 1, 1), 33, 1), (1, (2, 2, 2), 2, 3)],
    (1, (2, 1, 1), 50, 3),
]
LONG_KERNEL: Kernels = 1, (70, 1, 1), 1, 2  # more phases than are kept at a time


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_tap_products(checked: Harness, shape: Kernels) -> None:
    symbols, axes, n, m = shape
    taps = normal(symbols, math.prod(axes), n, m)
    (found,) = same_under_every_order(
        lambda order: (kernels.tap_products(checked, taps, axes, seed=order),)
    )
    torch.testing.assert_close(found, reference_products.tap_products(taps, axes))


@pytest.mark.parametrize("shape", [*KERNELS, LONG_KERNEL], ids=str)
def test_symbol_grams(checked: Harness, shape: Kernels) -> None:
    symbols, axes, n, m = shape
    taps = normal(symbols, math.prod(axes), n, m)
    periods = [9 if size > 1 else 1 for size in axes]
    centres = torch.arange(9).reshape(3, 3) % torch.tensor(periods)
    at, shifts = (torch.arange(3) % symbols, centres, periods), normal(3)
    products = reference_products.tap_products(taps, axes)
    (found,) = same_under_every_order(
        lambda order: (kernels.symbol_grams(checked, products, axes, at, shifts, seed=order),)
    )
    truth = reference_grams.symbol_grams(taps, axes, at, shifts)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.mH)


# shifted_grams, cholesky_bounds

CERTIFIED = [(2, 1, 1), (1, 31, 33), (2, 33, 40), (1, 70, 75)]


def certificate(
    checked: Harness, matrices: Tensor, lower: Tensor, seed: int = 1
) -> tuple[Tensor, ...]:
    """Gram matrices, scales, shifts, and bounds from torch's factors."""
    grams, scales, shifts = kernels.shifted_grams(checked, matrices, lower, seed=seed)
    factors, failures = torch.linalg.cholesky_ex(grams)
    factors += torch.triu(torch.full_like(factors, math.nan), 1)  # not to be read
    room = wide_gamma(sum(matrices.shape[1:]) + 1) * WIDE, WIDE * WIDE
    bounds = kernels.cholesky_bounds(
        checked, matrices, factors, failures, scales, shifts, room=room, seed=seed
    )
    return grams, scales, shifts, bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", CERTIFIED, ids=str)
def test_certificates(
    checked: Harness, shape: tuple[int, int, int], turned: bool, dtype: torch.dtype
) -> None:
    matrices = normal(*shape, dtype=dtype) * 37.0
    matrices = matrices.mT.contiguous().mT if turned else matrices
    truth = torch.linalg.matrix_norm(matrices.double(), 2)
    grams, scales, shifts, bounds = same_under_every_order(
        lambda order: certificate(checked, matrices, truth * (1 - 1e-9), order)
    )
    expected = reference_shifted.shifted_grams(matrices, truth * (1 - 1e-9), excess=1e-6)
    assert torch.equal(scales, expected[1])
    torch.testing.assert_close(shifts, expected[2], rtol=1e-15, atol=0)
    torch.testing.assert_close(grams, expected[0], rtol=1e-12, atol=1e-14)
    assert bool((truth <= bounds).all()) and bool((bounds <= truth * (1 + 1e-6)).all())


def test_certificates_of_extreme_matrices(checked: Harness) -> None:
    """Any factor proves something true; none proves nothing, and neither does one of NaN."""
    powers = torch.tensor([2.0**-1060, 2.0**-600, 1.0, 2.0**1000], dtype=torch.float64)
    powers = powers[:, None, None]
    matrices = normal(1, 3, 4).expand(4, 3, 4) * powers
    truth = torch.linalg.matrix_norm(normal(1, 3, 4), 2) * powers[:, 0, 0]
    _, scales, shifts, bounds = certificate(checked, matrices, truth)
    assert bool((truth <= bounds).all())
    assert bool((bounds <= truth * (1 + 1e-6))[1:].all())
    assert float(shifts[1:].min()) > 0.2
    room = wide_gamma(8) * WIDE, WIDE * WIDE
    factors = torch.zeros(4, 3, 3).double()
    factors[3, 2, 0] = math.nan
    failures = torch.tensor([0, 3, 0, 0])
    loose = kernels.cholesky_bounds(checked, matrices, factors, failures, scales, shifts, room=room)
    assert loose.isinf().tolist() == [False, True, False, True]
    assert bool((loose >= bounds).all())


@pytest.mark.parametrize("shape", CERTIFIED, ids=str)
def test_bounds_from_any_factor(checked: Harness, shape: tuple[int, int, int]) -> None:
    """The residual and the sums of magnitudes, each to its last digits."""
    batch, side, _ = shape
    matrices, factors = normal(*shape), normal(batch, side, side, seed=1)
    above = torch.triu(torch.full_like(factors, math.nan), 1)  # not to be read
    scales, shifts = torch.tensor([0.5, 2.0][:batch]).double(), normal(batch, seed=2).square() + 1
    failures = torch.zeros(batch, dtype=torch.int32)
    given = failures, scales, shifts
    truth = reference_bounds.cholesky_bounds(matrices, factors, *given)
    sizes = (matrices * scales[:, None, None]).square().sum((1, 2))
    sizes += factors.tril().square().sum((1, 2))
    for rounding in (0.0, 1.0):
        (found,) = same_under_every_order(
            lambda order, room=(rounding, 1.0): (
                kernels.cholesky_bounds(
                    checked, matrices, factors + above, *given, room=room, seed=order
                ),
            )
        )
        expected = ((truth * scales).square() + rounding * sizes).sqrt() / scales
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


# chain_jacobian_norms

CHAINS = [
    *[(1, 1), (3, 2), (1, 1, 1), (5, 1, 7), (33, 31, 10), (40, 33, 17, 10), (7, 13, 5, 31, 3)],
    *[(3, 70, 2), (5, 4, 14)],  # three groups of units; more rows than a warp sums at a time
    *[
        (19, 7, 18),
        (150, 6),
    ],  # Jacobians of a whole warp; a narrow layer of many inputs
]
LARGE_CHAINS = [(40, 64, 10), (50, 20, 1), (16, 8, 6, 14), (130, 140, 4), (20, 70, 30, 66)]


def stages(slopes: Sequence[float]) -> list[Stage]:
    """Linear layers, each with a LeakyReLU of its slope."""
    return [stage for slope in slopes for stage in (Linear(), Activation("leaky_relu", (slope,)))]


def chain(
    dims: tuple[int, ...], dtype: torch.dtype, networks: int = 2, bias: bool = True
) -> tuple[list[list[Tensor]], list[list[Tensor | None]]]:
    weights = [
        [normal(b, a, seed=7 * n + a + b, dtype=dtype) / math.sqrt(a) for a, b in pairwise(dims)]
        for n in range(networks)
    ]
    biases: list[list[Tensor | None]] = [
        [normal(b, seed=n + b, dtype=dtype) if bias else None for b in dims[1:]]
        for n in range(networks)
    ]
    return weights, biases


def off_kinks(
    x: Tensor,
    weights: list[list[Tensor]],
    biases: list[list[Tensor | None]],
    slopes: Sequence[float],
) -> Tensor:
    """The samples for which no rounding carries a unit over its kink: |z| exceeds z's error bound.

    A fused multiply-add may decide on which side a unit lies, and with it the Jacobian.
    """
    good = torch.ones(len(x), dtype=torch.bool)
    for network, network_biases in zip(weights, biases, strict=True):
        z, error = x.double(), torch.zeros(x.shape, dtype=torch.float64)
        for weight, bias, slope in zip(network, network_biases, slopes, strict=True):
            w, b = weight.double(), torch.zeros(len(weight)) if bias is None else bias.double()
            relative = (w.shape[1] + 2) * EPS[x.dtype]
            error = (error + relative * z.abs()) @ w.abs().T + relative * b.abs()
            z = z @ w.T + b
            good &= (z.abs() > error).all(1)
            z = torch.where(z > 0, z, slope * z)
    return x[good]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", CHAINS, ids=str)
def test_chain_jacobian_norms(checked: Harness, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    for slope, last, bias in [(0.0, 1.0, True), (-0.5, 0.1, False)]:
        weights, biases = chain(dims, dtype, bias=bias)
        slopes = [slope] * (len(dims) - 2) + [last]
        x = off_kinks(normal(40, dims[0], seed=3, dtype=dtype), weights, biases, slopes)[:9]
        assert len(x) == 9

        def run(order: int) -> tuple[Tensor, ...]:
            chosen = stages(slopes)  # noqa: B023
            return kernels.chain_jacobian_norms(checked, x, weights, biases, chosen, seed=order)  # noqa: B023

        found = same_under_every_order(run) if slope == 0 else run(1)
        truth = reference_chain.chain_jacobian_norms(x, weights, biases, stages(slopes))
        tolerance = 8 * sum(dims) * EPS[dtype]
        for one, other in zip(found, truth, strict=True):
            torch.testing.assert_close(
                one.double(), other, rtol=tolerance, atol=tolerance * float(truth[1].max())
            )


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", LARGE_CHAINS, ids=str)
def test_large_chains(checked: Harness, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    test_chain_jacobian_norms(checked, dtype, dims)


BATCHES = [0, 1, 7, 8, 17]


@pytest.mark.parametrize("batch", BATCHES)
def test_chain_batches(checked: Harness, batch: int) -> None:
    weights, biases = chain((6, 9, 3), torch.float64)
    x = off_kinks(normal(batch, 6), weights, biases, [0.0, 1.0])
    assert len(x) == batch
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages([0.0, 1.0]), grid=3)
    assert found[0].shape == (2, batch)
    if batch:
        truth = reference_chain.chain_jacobian_norms(x, weights, biases, stages([0.0, 1.0]))
        torch.testing.assert_close(found[0], truth[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("warps", [4, 8, 12])
def test_a_chain_does_not_depend_on_the_blocks(checked: Harness, warps: int, rounds: int) -> None:
    weights, biases = chain((9, 37, 5), torch.float32, networks=1)
    x, relu = normal(13, 9, dtype=torch.float32), [Linear(), Activation("relu"), Linear()]
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, relu, rounds=1)
    other = kernels.chain_jacobian_norms(
        checked, x, weights, biases, relu, warps=warps, rounds=rounds, grid=1
    )
    assert torch.equal(found[0], other[0])
    assert torch.equal(found[1], other[1])


# By tensor cores: chains in float32 whose units are all active.

SMOOTH = [(3, 5, 2), (33, 31, 10), (9, 70, 37, 5), (7, 13, 100, 3), (19, 34, 18), (5, 40, 33)]


def smooth(name: str, layers: int) -> list[Stage]:
    """Linear layers, each but the last with an activation."""
    return [stage for _ in range(layers) for stage in (Linear(), Activation(name))][:-1]


@pytest.mark.parametrize("dims", SMOOTH, ids=str)
def test_chain_on_tensor_cores(checked: Harness, dims: tuple[int, ...]) -> None:
    weights, biases = chain(dims, torch.float32)
    x, stages = normal(9, dims[0], seed=3, dtype=torch.float32), smooth("gelu", len(dims) - 1)

    def run(order: int) -> tuple[Tensor, ...]:
        return kernels.chain_jacobian_norms(checked, x, weights, biases, stages, seed=order)

    found = same_under_every_order(run)
    for one, truth in zip(
        found, reference_chain.chain_jacobian_norms(x, weights, biases, stages), strict=True
    ):
        torch.testing.assert_close(one.double(), truth, rtol=1e-6, atol=0)
    plain = kernels.chain_jacobian_norms(checked, x, weights, biases, stages, dense=False)
    assert not torch.equal(found[1], plain[1])  # another way it was


@pytest.mark.parametrize("name", ["tanh", "silu", "softplus", "elu", "leaky_relu"])
def test_activations_that_leave_units_active(checked: Harness, name: str) -> None:
    weights, biases = chain((9, 37, 40, 4), torch.float32, networks=1)
    stages: list[Stage] = [
        stage
        for layer in (Linear(), Linear())
        for stage in (layer, Activation(name, PARAMETERS.get(name, ())))
    ]
    stages.append(Linear())
    x = normal(5, 9, seed=3, dtype=torch.float32)
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages)
    for one, truth in zip(
        found, reference_chain.chain_jacobian_norms(x, weights, biases, stages), strict=True
    ):
        torch.testing.assert_close(one.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("warps", [4, 8, 12])
def test_tensor_cores_do_not_depend_on_the_blocks(checked: Harness, warps: int) -> None:
    weights, biases = chain((9, 70, 37, 5), torch.float32, networks=1)
    x, stages = normal(13, 9, dtype=torch.float32), smooth("gelu", 3)
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages, rounds=1)
    other = kernels.chain_jacobian_norms(checked, x, weights, biases, stages, warps=warps, grid=1)
    assert torch.equal(found[0], other[0])
    assert torch.equal(found[1], other[1])


def test_tensor_cores_where_terms_cancel(checked: Harness) -> None:
    """Sums of terms 300 times as large as they are, and rows of sizes that differ by 2^40."""
    weights, biases = chain((12, 80, 40, 6), torch.float32, networks=1, bias=False)
    first, middle, last = weights[0]
    last[:, 20:] = -last[:, :20] + 0.003 * last[:, 20:]
    middle[20:] = middle[:20]
    first *= torch.logspace(-3, 3, 80)[:, None]
    middle /= torch.logspace(-3, 3, 80)
    last *= torch.logspace(-6, 6, 6)[:, None]
    x, stages = 1e-4 * normal(5, 12, dtype=torch.float32), smooth("tanh", 3)
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages)
    plain = kernels.chain_jacobian_norms(checked, x, weights, biases, stages, dense=False)
    truth = reference_chain.chain_jacobian_norms(x, weights, biases, stages)
    for one, other, right in zip(found, plain, truth, strict=True):
        # Terms that cancel cost float32 bits in any order.
        error = float((other.double() / right - 1).abs().max())
        torch.testing.assert_close(one.double(), right, rtol=max(1e-6, 4 * error), atol=0)


# Powers of two for the weights of three layers; what tensor cores drop is above 1e-6 there.
SCALES = [(-60, 0, -66), (100, -4, -110), (-118, 30, 60), (-118, 60, 58), (20, -142, 126)]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_weights_beyond_the_range_of_tensor_cores(
    checked: Harness, scales: tuple[int, ...]
) -> None:
    weights, biases = chain((6, 12, 9, 3), torch.float32, networks=1, bias=False)
    weights[0] = [weight * 2.0**power for weight, power in zip(weights[0], scales, strict=True)]
    # Nearly linear, whatever the scale.
    stages: list[Stage] = smooth("leaky_relu", 3)
    stages = [
        Activation("leaky_relu", (0.99,)) if isinstance(stage, Activation) else stage
        for stage in stages
    ]
    x = normal(5, 6, dtype=torch.float32) * 2.0 ** -sum(power for power in scales[:1])
    run = [
        kernels.chain_jacobian_norms(checked, x, weights, biases, stages, dense=dense)
        for dense in (True, False)
    ]
    truth = reference_chain.chain_jacobian_norms(x, weights, biases, stages)
    for one, plain, right in zip(*run, truth, strict=True):
        assert torch.equal(one, plain)
        torch.testing.assert_close(one.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tensor_cores_keep_bad_samples_apart(checked: Harness, bad: float) -> None:
    weights, biases = chain((6, 40, 3), torch.float32, networks=2)
    x, stages = normal(6, 6, dtype=torch.float32), smooth("gelu", 2)
    good = kernels.chain_jacobian_norms(checked, x, weights, biases, stages)
    x[2, 1] = bad
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages)
    assert found[0].isnan().tolist() == [[i == 2 for i in range(6)]] * 2
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(found[0][:, keep], good[0][:, keep])
    weights[1][0][3, 2] = bad
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages)
    assert bool(found[0][1].isnan().all())
    assert torch.equal(found[0][0, keep], good[0][0, keep])


PARAMETERS = {
    "leaky_relu": (0.2,),
    "hardtanh": (-0.4, 0.5),
    "softplus": (2.0, 3.0),
    "elu": (1.3,),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_chain_activations(checked: Harness, dtype: torch.dtype, name: str) -> None:
    """Two in a row after the first layer, one after the last; large inputs among the samples."""
    activation = Activation(name, PARAMETERS.get(name, ()))
    chosen = [Linear(), activation, Activation("tanh"), Linear(), activation]
    weights, biases = chain((5, 34, 3), dtype)
    x = normal(7, 5, seed=4, dtype=dtype) * torch.tensor([[1.0]] * 6 + [[30.0]], dtype=dtype)
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, chosen)
    truth = reference_chain.chain_jacobian_norms(x, weights, biases, chosen)
    tolerance = 400 * EPS[dtype]
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance * float(truth[1].max())
        )


def test_chain_of_sliced_weights(checked: Harness) -> None:
    """Copies of 16 bytes need addresses aligned to them, which a slice's are not."""
    for dtype in DTYPES:
        weights, biases = chain((8, 12, 3), dtype)
        x, relu = normal(5, 8, dtype=dtype), stages([0.0, 1.0])
        whole = kernels.chain_jacobian_norms(checked, x, weights, biases, relu)
        slices = kernels.chain_jacobian_norms(checked, x, weights, biases, relu, offset=1)
        assert torch.equal(whole[0], slices[0])


def test_chain_kinks_nan_and_dead_networks(checked: Harness) -> None:
    identity = [[torch.eye(2)]]
    x = torch.tensor([[0.0, 1.0], [-0.0, -1.0]])
    found = kernels.chain_jacobian_norms(checked, x, identity, [[None]], stages([0.5]))[0]
    assert found.tolist() == [[1.0, 0.5]]
    x[1, 0] = math.nan
    found = kernels.chain_jacobian_norms(checked, x, identity, [[None]], stages([0.0]))[0]
    assert found.isnan().tolist() == [[False, True]]
    dead = [[torch.ones(40, 3), torch.ones(2, 40)]]
    biases = [[torch.full((40,), -100.0), None]]
    found = kernels.chain_jacobian_norms(
        checked, torch.ones(3, 3), dead, biases, stages([0.0, 1.0])
    )
    assert found[0].tolist() == found[1].tolist() == [[0.0] * 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chain_of_a_dead_layer_above_a_wide_one(checked: Harness, dtype: torch.dtype) -> None:
    """Two panels of columns, with no barrier of the block between: no unit above is active."""
    weights, biases = chain((3, 300, 2, 1), dtype, networks=1)
    biases[0][1] = torch.full((2,), -1000.0, dtype=dtype)
    x = normal(5, 3, dtype=dtype)
    found = kernels.chain_jacobian_norms(checked, x, weights, biases, stages([0.0, 0.0, 1.0]))
    assert found[0].tolist() == found[1].tolist() == [[0.0] * 5]


# The same bodies under the sanitizers.


def test_sanitizers_find_nothing(sanitized: Harness) -> None:
    for dtype in DTYPES:
        for shape in [(2, 33, 5), (2, 3, 40)]:
            kernels.jacobian_reduction(sanitized, normal(*shape, dtype=dtype))
        weights, biases = chain((33, 31, 5), dtype)
        kernels.chain_jacobian_norms(
            sanitized, normal(9, 33, dtype=dtype), weights, biases, stages([0.1, 1.0]), grid=1
        )
    matrices = [matrix for matrix in spectral_matrices() if matrix.numel() < 1500]
    kernels.spectral_norms(sanitized, matrices, grid=2, block=32, tolerance=1e-4)
    kernels.spectral_norms(sanitized, matrices, grid=2, tolerance=1e-4, resident_shared=16000)
    square = complex_normal(1, 33, 33)
    kernels.hermitian_residual(sanitized, square, complex_normal(1, 33, 7), square)
    taps, axes, centres = normal(1, 2, 33, 3), (2, 1, 1), torch.ones(1, 3, dtype=torch.int64)
    products = kernels.tap_products(sanitized, taps, axes)
    kernels.tap_products(sanitized, normal(1, 1, 50, 3), (1, 1, 1))
    zero = torch.zeros(1, dtype=torch.int64)
    kernels.symbol_grams(sanitized, products, axes, (zero, centres, axes), normal(1))
    many = [normal(3, 2, seed=index) for index in range(50)]
    kernels.spectral_norms(sanitized, many, grid=2, block=32, tolerance=1e-2, together=True)
    certificate(sanitized, normal(2, 33, 34), torch.full((2,), 12.0).double())


@pytest.mark.long
def test_sanitizers_find_nothing_in_large_cases(sanitized: Harness) -> None:
    kernels.jacobian_reduction(sanitized, normal(1, 65, 70))
    for dtype in DTYPES:
        weights, biases = chain((20, 70, 30, 66), dtype)
        kernels.chain_jacobian_norms(
            sanitized, normal(9, 20, dtype=dtype), weights, biases, stages([0.1, 0.0, 1.0]), grid=1
        )
    kernels.spectral_norms(sanitized, [normal(5, 9000, dtype=torch.float32), normal(90, 70)])

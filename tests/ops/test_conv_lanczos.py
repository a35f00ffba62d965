"""The lower value at the true size is the first singular value, not one that a start favours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.ops._conv_lanczos import amplified, top_of_tridiagonal, unseen_share
from lipfast.ops._conv_search import ConvStart
from lipfast.reference.conv_norms import conv_matrix
from tests.support.conv_cases import FAMILIES, STRUCTURED, draw, together

# What rounding alone costs the truth.
SVD_ERROR = 1e-13


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny convolutions wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(seed: int, count: int, rtol: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    families = (*STRUCTURED, *STRUCTURED, *FAMILIES)
    cases = [draw(generator, 400, families=families, more=3) for _ in range(count)]
    norms = lipfast.conv_norms(
        [case.kernel for case in cases], **together(cases), rtol=rtol, max_cells=1
    )
    for case, lower, upper in zip(cases, norms.lower.tolist(), norms.upper.tolist(), strict=True):
        value = float(torch.linalg.svdvals(case.matrix)[0])
        assert lower >= value * (1 - rtol), (case.options, lower, value)
        assert lower <= value * (1 + SVD_ERROR), case.options
        assert upper >= value * (1 - SVD_ERROR), case.options


def test_filters_of_every_kind_are_within_rtol() -> None:
    check(21, 250)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_five_thousand_are_within_rtol(seed: int) -> None:
    check(100 + seed, 500)


@pytest.mark.long
@pytest.mark.parametrize("rtol", [1e-5, 1e-2])
def test_other_tolerances_are_kept(rtol: float) -> None:
    check(200, 500, rtol)


def blur(taps: int, width: float) -> Tensor:
    place = torch.arange(taps) - (taps - 1) / 2
    profile = torch.exp(-0.5 * (place / width) ** 2)
    return torch.outer(profile, profile) / profile.sum() ** 2


def test_symmetric_filters_whose_first_vector_is_no_bump() -> None:
    """Blurs under dilation on small inputs: residue classes decouple, and the borders decide."""
    sizes, widths = ((9, 8), (8, 8), (7, 10)), (0.6, 1.0, 2.0, 5.0)
    for size in sizes:
        for dilation in (1, 2, 3):
            kernels = [blur(5, width).expand(2, 2, 5, 5).clone() for width in widths]
            options = {"padding": dilation * 2 - 1, "dilation": dilation}
            norms = lipfast.conv_norms(kernels, input_sizes=size, max_cells=1, **options)
            for kernel, lower in zip(kernels, norms.lower.tolist(), strict=True):
                value = explicit(kernel, size, **options)[0]
                assert value * (1 - 1e-3) <= lower <= value * (1 + SVD_ERROR)


def explicit(kernel: Tensor, size: tuple[int, int], padding: int, dilation: int = 1) -> list[float]:
    matrix = conv_matrix(
        kernel,
        size,
        stride=(1, 1),
        padding=[(padding, padding)] * 2,
        dilation=(dilation, dilation),
    )
    return torch.linalg.svdvals(matrix).tolist()


def test_starts_at_another_singular_vector() -> None:
    """A start that a caller gives may be any singular vector; the answer is the first value."""
    generator = torch.Generator().manual_seed(5)
    size = (6, 7)
    for kernel in (blur(3, 1.0).reshape(1, 1, 3, 3), torch.randn(3, 2, 3, 3, generator=generator)):
        cold = lipfast.conv_norms(kernel, input_sizes=size, padding=1)
        matrix = conv_matrix(kernel, size, stride=(1, 1), padding=[(1, 1)] * 2, dilation=(1, 1))
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        for index in (0, 1, 2, 5, len(values) - 1):
            planted = ConvStart(
                right[index].reshape(cold.right[0].shape),
                left[:, index].reshape(cold.left[0].shape),
                cold.maximum[0],
                None,
            )
            warm = lipfast.conv_norms(
                {"a": kernel}, input_sizes=size, padding=1, start={"a": planted}
            )
            assert float(values[0]) * (1 - 1e-3) <= float(warm.lower["a"])


def test_channels_that_the_symbol_does_not_favour() -> None:
    """A wide blur in one channel has the larger symbol; at this size the other channel wins."""
    for share in (0.8, 0.9, 0.95):
        kernel = torch.zeros(2, 2, 5, 5)
        kernel[0, 0] = blur(5, 5.0)
        kernel[1, 1, 2, 2] = share
        values = explicit(kernel, (8, 8), padding=2)
        norms = lipfast.conv_norms(kernel, input_sizes=(8, 8), padding=2)
        assert values[0] * (1 - 1e-3) <= float(norms.lower[0]) <= values[0] * (1 + SVD_ERROR)


def test_the_same_bits_each_time_and_no_generator_is_touched() -> None:
    kernel = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(6))
    state = torch.random.get_rng_state()
    first, again = (lipfast.conv_norms(kernel, input_sizes=(9, 9), padding=1) for _ in range(2))
    assert torch.equal(first.lower, again.lower) and torch.equal(first.right[0], again.right[0])
    assert torch.equal(state, torch.random.get_rng_state())
    # Alone and among others.
    other = lipfast.conv_norms([kernel.flip(0), kernel], input_sizes=(9, 9), padding=1)
    assert float(other.lower[1]) == float(first.lower[0])


def lanczos(matrix: Tensor, start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    basis, diagonal, off = [start / start.norm()], [], []
    for _ in range(steps):
        image = matrix @ basis[-1]
        diagonal.append(float(image @ basis[-1]))
        for _ in range(2):
            for q in basis:
                image = image - (q @ image) * q
        off.append(float(image.norm()))
        basis.append(image / image.norm())
    return diagonal, off


def test_no_eigenvalue_has_a_larger_share_than_the_bound() -> None:
    """Whatever the start: the share of an eigenvector above all Ritz values is at most that."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        values = torch.rand(12, generator=generator, dtype=torch.float64)
        values[0] = 1.2
        start = torch.randn(12, generator=generator, dtype=torch.float64)
        start[0] *= 1e-3
        for steps in (1, 2, 4, 6):
            diagonal, off = lanczos(torch.diag(values), start, steps)
            value, ritz = top_of_tridiagonal(diagonal, off)
            share = float(start[0] ** 2 / (start @ start))
            assert value < 1.2
            assert unseen_share(diagonal, off, 1.2) >= share * (1 - 1e-9)
            assert unseen_share(diagonal, off, 1.3) < unseen_share(diagonal, off, 1.2)
            # The Ritz vector's share, by its polynomial.
            grown = amplified(diagonal, off, ritz, 1.2) * share
            assert grown == pytest.approx(_ritz_share(values, start, ritz, steps), rel=1e-6)


def _ritz_share(values: Tensor, start: Tensor, ritz: object, steps: int) -> float:
    basis = [start / start.norm()]
    for _ in range(steps - 1):
        image = values * basis[-1]
        for _ in range(2):
            for q in basis:
                image = image - (q @ image) * q
        basis.append(image / image.norm())
    vector = torch.as_tensor(ritz, dtype=torch.float64) @ torch.stack(basis)
    return float(vector[0] ** 2 / (vector @ vector))


def test_restarts_remember_what_was_excluded() -> None:
    """With room for three vectors only."""
    kernel = blur(5, 2.0).expand(2, 2, 5, 5).clone()
    value = explicit(kernel, (9, 9), padding=2)[0]
    norms = lipfast.conv_norms(kernel, input_sizes=(9, 9), padding=2, memory=3 * 162 * 4)
    assert value * (1 - 1e-3) <= float(norms.lower[0])
    assert int(norms.passes[0]) < 300

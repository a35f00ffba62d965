"""lower <= truth <= upper with no tolerance: the truth is exact everywhere in this file."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lipfast
from lipfast import _native
from tests.support.exact_norms import (
    FAMILIES,
    SPECTRA,
    Known,
    any_known,
    assert_known,
    circulant,
    definiteness,
    hadamard,
    holds_exactly,
    rank_one,
    row_or_column,
    signed_permutation,
    with_spectrum,
)

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"rtol": 1e-12},
    {"rtol": 1e-2},
    {"certify": False},
    {"method": "power", "max_passes": 3},
    {"max_passes": 1},
    {"memory": 1},
)


def check_known(known: list[Known], **options: Any) -> None:
    norms = lipfast.spectral_norms([entry.matrix for entry in known], **options)
    for entry, lower, upper in zip(known, norms.lower.tolist(), norms.upper.tolist(), strict=True):
        assert_known(entry, lower, upper)


def check_exactly(matrices: list[Tensor], **options: Any) -> None:
    norms = lipfast.spectral_norms(matrices, **options)
    for matrix, lower, upper in zip(
        matrices, norms.lower.tolist(), norms.upper.tolist(), strict=True
    ):
        assert holds_exactly(matrix, lower, upper), (matrix, lower, upper)


def test_the_judges_know_right_from_wrong() -> None:
    assert definiteness([[2, 1], [1, 2]]) == 1
    assert definiteness([[1, 1], [1, 1]]) == definiteness([[0, 0], [0, 3]]) == 0
    assert definiteness([[1, 2], [2, 1]]) == definiteness([[0, 1], [1, 5]]) == -1
    matrix = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert holds_exactly(matrix, 4.0, 4.0)
    assert not holds_exactly(matrix, math.nextafter(4.0, 5.0), 5.0)
    assert not holds_exactly(matrix, 3.0, math.nextafter(4.0, 0.0))
    generator = torch.Generator().manual_seed(0)
    known = with_spectrum("clustered", 16, 8, -3, generator)
    truth = float(torch.linalg.svdvals(known.matrix)[0])
    assert math.isclose(truth, math.sqrt(known.square), rel_tol=1e-13)
    with pytest.raises(AssertionError):
        assert_known(known, 0.0, truth * (1 - 1e-12))


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(capability: str, name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((64, 64), (128, 128), (32, 128), (128, 16), (2, 256))
    known = [with_spectrum(name, *shape, -40, generator) for shape in shapes]
    for options in OPTIONS:
        check_known(known, **options)
    norms = lipfast.spectral_norms([entry.matrix for entry in known])
    assert bool((norms.upper - norms.lower <= 1e-6 * norms.upper).all())


def test_hand_picked(capability: str) -> None:
    generator = torch.Generator().manual_seed(6)
    steps = torch.arange(150, dtype=torch.float64)
    known = [
        Known(torch.zeros(5, 7), Fraction(0)),
        Known(torch.zeros(90, 70), Fraction(0)),
        Known(torch.full((1, 1), 5e-324, dtype=torch.float64), Fraction(5e-324) ** 2),
        Known(torch.full((1, 1), -0.1), Fraction(float(torch.tensor(0.1))) ** 2),
        Known(torch.full((1, 1), 1.7e308, dtype=torch.float64), Fraction(1.7e308) ** 2),
        Known(torch.full((9, 16), 0.1), 144 * Fraction(float(torch.tensor(0.1))) ** 2),
        Known(torch.full((80, 80), 1e-320, dtype=torch.float64), 6400 * Fraction(1e-320) ** 2),
        Known(torch.eye(100) * 0.1, Fraction(float(torch.tensor(0.1))) ** 2),
        Known(0.1 * hadamard(128, generator).double(), 128 * Fraction(0.1) ** 2),
        signed_permutation(1 - (steps / 150) ** 2, generator),
        signed_permutation(10.0 ** torch.linspace(-30, 30, 100).double(), generator),
        signed_permutation(1 - 1e-12 * steps, generator),
        circulant(100, generator),
        rank_one(70, 100, generator),
        *(row_or_column(n, row, generator) for n in (1, 2, 7, 100, 1000) for row in (True, False)),
    ]
    for options in OPTIONS:
        check_known(known, **options)
    strided = [Known(entry.matrix.T, entry.square) for entry in known]
    repeated = [Known(entry.matrix.repeat_interleave(2, 0)[::2], entry.square) for entry in known]
    assert not repeated[9].matrix.is_contiguous()
    check_known(strided + repeated)


def test_bad_start_vectors(capability: str) -> None:
    """Exactly orthogonal to the top one, the bottom one, zero, random, huge."""
    generator = torch.Generator().manual_seed(7)
    for n in (8, 128):
        values = torch.arange(1, n + 1, dtype=torch.float64)
        matrix = torch.diag(values)
        unit = torch.eye(n, dtype=torch.float64)
        starts = [
            unit[0],
            unit[n // 2],
            unit[n - 1],
            torch.zeros(n, dtype=torch.float64),
            torch.randn(n, generator=generator),
            torch.full((n,), 1e300, dtype=torch.float64),
            torch.full((n,), 1e-300, dtype=torch.float64),
        ]
        for options in OPTIONS:
            norms = lipfast.spectral_norms([matrix] * len(starts), start=starts, **options)
            for lower, upper in zip(norms.lower.tolist(), norms.upper.tolist(), strict=True):
                assert lower <= n <= upper


def test_start_at_another_singular_vector(capability: str) -> None:
    """Dense matrices, started exactly at each right singular vector but the top one."""
    generator = torch.Generator().manual_seed(10)
    n = 64
    values = torch.arange(1, n + 1, dtype=torch.float64) * 1000
    right = hadamard(n, generator).double()
    matrix = (hadamard(n, generator).double() * values) @ right
    starts = list(right[:-1])
    for options in OPTIONS:
        norms = lipfast.spectral_norms([matrix] * len(starts), start=starts, **options)
        for lower, upper in zip(norms.lower.tolist(), norms.upper.tolist(), strict=True):
            assert lower <= n * n * 1000 <= upper
    norms = lipfast.spectral_norms([matrix] * len(starts), start=starts)
    assert bool((norms.upper - norms.lower <= 1e-6 * norms.upper).all())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_in_integers(capability: str, family: str) -> None:
    generator = torch.Generator().manual_seed(8)
    shapes = ((1, 1), (1, 6), (6, 1), (2, 2), (3, 5), (5, 4), (7, 7))
    matrices = [FAMILIES[family](*shape, generator) for shape in shapes]
    for options in OPTIONS:
        check_exactly(matrices, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_in_integers(capability: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    matrices = [
        FAMILIES[family](4, 6, generator).to(dtype)
        for family in ("gaussian", "nearly orthogonal", "integers", "rank one and noise")
    ]
    check_exactly(matrices)
    check_exactly([matrix.T for matrix in matrices])


def generated(seed: int, family: str, count: int, largest: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randint(1, largest + 1, (count, 2), generator=generator).tolist()
    return [FAMILIES[family](rows, cols, generator) for rows, cols in shapes]


examples = {
    "seed": st.integers(0, 2**31),
    "family": st.sampled_from(sorted(FAMILIES)),
    "options": st.sampled_from(OPTIONS),
}


@given(**examples)
def test_generated_in_integers(seed: int, family: str, options: dict[str, Any]) -> None:
    check_exactly(generated(seed, family, 3), **options)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**31), options=st.sampled_from(OPTIONS))
def test_generated_with_known_norms(seed: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_known([any_known(generator, largest=6) for _ in range(3)], **options)


@pytest.mark.long
@pytest.mark.parametrize("name", _native.available_capabilities())
@settings(max_examples=750)
@given(**examples)
def test_campaign_in_integers(name: str, seed: int, family: str, options: dict[str, Any]) -> None:
    """15,000 matrices for each instruction set."""
    with _native.forced_capability(name):
        check_exactly(generated(seed, family, 20), **options)


@pytest.mark.long
@pytest.mark.parametrize("name", _native.available_capabilities())
@settings(max_examples=500)
@given(seed=st.integers(0, 2**31), options=st.sampled_from(OPTIONS))
def test_campaign_with_known_norms(name: str, seed: int, options: dict[str, Any]) -> None:
    """10,000 matrices with sides up to 300 for each instruction set."""
    generator = torch.Generator().manual_seed(seed)
    with _native.forced_capability(name):
        check_known([any_known(generator) for _ in range(20)], **options)

"""The certificate of matrices on CUDA, which runs on every device: never below, and tight."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lipfast.ops.gram_certificate import Brackets, prove_upper_bounds, tighten
from lipfast.ops.spectral_norms import DEFAULT_MEMORY
from tests.support.exact_norms import FAMILIES, Known, any_known, holds_exactly, with_spectrum

MEMORY = DEFAULT_MEMORY


def estimate(matrices: list[Tensor], starts: list[Tensor], max_passes: int = 300) -> Brackets:
    """As the CUDA op, lower bounds only; upper ones infinite."""
    if starts:
        return estimate_near(matrices, starts, max_passes)
    flat = torch.ops.lipfast.spectral_norms(
        matrices, starts, False, 1e-6, max_passes, False, 0, MEMORY
    )
    lower, upper, passes, codes, right, left = flat
    return Brackets(
        lower,
        upper,
        passes,
        codes,
        list(right.split([matrix.shape[1] for matrix in matrices])),
        list(left.split([matrix.shape[0] for matrix in matrices])),
    )


def estimate_near(matrices: list[Tensor], starts: list[Tensor], max_passes: int) -> Brackets:
    """From starts alone, as the CUDA op; that of the CPU adds noise where it proves nothing."""
    right = [
        top_vector(w.double(), start, max_passes) for w, start in zip(matrices, starts, strict=True)
    ]
    left = [w.double() @ v for w, v in zip(matrices, right, strict=True)]
    lower = torch.stack([image.norm() for image in left]) * (1 - 1e-12)
    count = torch.full((len(matrices),), max_passes, dtype=torch.int32)
    upper, codes = torch.full_like(lower, math.inf), torch.zeros_like(count)
    left = [image / image.norm().clamp_min(1e-300) for image in left]
    return Brackets(lower, upper, count, codes, right, left)


def top_vector(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """A unit vector of the largest Ritz value of W^T W after some steps of Lanczos."""
    basis = (start.double() / start.double().norm())[:, None]
    for _ in range(min(steps, matrix.shape[1]) - 1):
        image = matrix.T @ (matrix @ basis[:, -1])
        for _ in range(2):
            image = image - basis @ (basis.T @ image)
        if not float(image.norm()) > 0:
            break
        basis = torch.cat([basis, (image / image.norm())[:, None]], 1)
    projected = matrix @ basis
    vector = basis @ torch.linalg.eigh(projected.T @ projected)[1][:, -1]
    return vector / vector.norm()


def bracket(
    matrices: list[Tensor], rtol: float = 1e-6, memory: int = MEMORY, max_passes: int = 300
) -> Brackets:
    found, codes = tighten(
        matrices,
        estimate(matrices, [], max_passes),
        lambda some, near: estimate(some, near, max_passes),
        rtol=rtol,
        memory=memory,
    )
    assert codes == found.codes.tolist()
    return found


def prove(matrices: list[Tensor], lower: list[float], memory: int = MEMORY) -> list[float]:
    at = torch.tensor(lower, dtype=torch.float64)
    return prove_upper_bounds(matrices, at, excess=1e-6, memory=memory).tolist()


def assert_right(known: list[Known], found: Brackets) -> None:
    for entry, lower, upper in zip(known, found.lower.tolist(), found.upper.tolist(), strict=True):
        assert Fraction(lower) ** 2 <= entry.square
        assert upper == math.inf or entry.square <= Fraction(upper) ** 2


@pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-12])
def test_never_below(rtol: float, generator: torch.Generator) -> None:
    known = [any_known(generator, largest=5) for _ in range(60)]
    known = [entry for entry in known if bool(entry.matrix.any())]
    assert_right(known, bracket([entry.matrix for entry in known], rtol))


@pytest.mark.long
def test_never_below_at_length(generator: torch.Generator) -> None:
    for count in range(40):
        known = [any_known(generator) for _ in range(50)]
        known = [entry for entry in known if bool(entry.matrix.any())]
        options: dict[str, Any] = {"max_passes": 1 + count % 5} if count % 2 else {}
        assert_right(
            known, bracket([entry.matrix for entry in known], 10.0 ** -(count % 13), **options)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_never_below_in_rational_arithmetic(family: str, generator: torch.Generator) -> None:
    make = FAMILIES[family]
    shapes = [(1, 1), (3, 2), (4, 9), (6, 6)]
    matrices = [make(rows, cols, generator).contiguous() for rows, cols in shapes]
    matrices = [matrix for matrix in matrices if bool(matrix.any())]
    found = bracket(matrices)
    for matrix, lower, upper in zip(
        matrices, found.lower.tolist(), found.upper.tolist(), strict=True
    ):
        assert holds_exactly(matrix, lower, upper)


def test_tight(generator: torch.Generator) -> None:
    shapes = [(1, 1), (5, 9), (9, 5), (40, 40), (64, 100), (5, 9)]
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    matrices += [matrix.float() for matrix in matrices]
    found = bracket(matrices)
    assert bool(((found.upper - found.lower) <= 1e-6 * found.upper).all())
    assert set(found.codes.tolist()) == {1}


@pytest.mark.parametrize("seed", range(10))
def test_a_dense_spectrum_is_refined(seed: int) -> None:
    """Few passes are far from enough here; the failed shifts lead to a better start."""
    generator = torch.Generator().manual_seed(seed)
    entry = with_spectrum("dense at the top", 64, 64, 0, generator)
    before = estimate([entry.matrix], [], max_passes=12)
    found = bracket([entry.matrix], max_passes=12)
    assert float(before.lower) < math.sqrt(entry.square) * (1 - 1e-6)
    assert float(found.lower) > float(before.lower)
    assert float(found.upper) <= float(found.lower) * (1 + 2e-6)
    assert int(found.passes) > int(before.passes)
    assert_right([entry], found)


def test_a_wrong_factor_proves_nothing_false(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that emulates float64 may be off, or say that it succeeded when it did not."""
    matrix = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    truth = float(torch.linalg.svdvals(matrix)[0])
    honest = torch.linalg.cholesky_ex

    def off(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        factors, failures = honest(shifted, upper=upper)
        return factors * (1 + 1e-4), failures

    def lying(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        return torch.ones_like(shifted), torch.zeros(len(shifted), dtype=torch.int32)

    for library in (off, lying):
        monkeypatch.setattr(torch.linalg, "cholesky_ex", library)
        for lower in (0.5 * truth, truth * (1 - 1e-9)):
            assert prove([matrix], [lower])[0] >= truth * (1 - 1e-14)


def test_matrices_of_one_shape_are_proved_together(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch per stage for each shape, whichever side is the smaller; as each one alone."""
    shapes = [(5, 9), (9, 5), (7, 7)] * 10
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    alone = [float(bracket([matrix]).upper) for matrix in matrices]
    honest, calls = torch.linalg.cholesky_ex, []

    def counted(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        calls.append(len(shifted))
        return honest(shifted, upper=upper)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    found = bracket(matrices)
    assert calls == [20, 10]
    torch.testing.assert_close(found.upper.tolist(), alone, rtol=1e-12, atol=0)


def test_bad_and_zero_matrices_keep_what_is_known(generator: torch.Generator) -> None:
    good = torch.randn(4, 3, generator=generator)
    matrices = [good, torch.full((4, 3), math.nan), torch.zeros(4, 3), 2.0**-149 * torch.ones(4, 3)]
    known = estimate(matrices, [])
    found, codes = tighten(matrices, known, estimate, rtol=1e-6, memory=MEMORY)
    assert codes[:2] == [1, -1] and codes[3] == 1
    assert found.upper[2] >= found.lower[2] == 0
    for index in (0, 3):
        truth = float(torch.linalg.svdvals(matrices[index].double())[0])
        assert truth * (1 - 1e-14) <= found.upper[index] <= truth * (1 + 2e-6)


def test_gradients_are_those_of_the_estimate(generator: torch.Generator) -> None:
    matrix = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    found = bracket([matrix])
    (lower,) = torch.autograd.grad(found.lower.sum(), matrix, retain_graph=True)
    u, _, v = torch.linalg.svd(matrix.detach())
    expected = torch.outer(u[:, 0], v[0])
    torch.testing.assert_close(lower, expected, rtol=1e-2, atol=1e-2)


def test_without_memory_nothing_is_proved(generator: torch.Generator) -> None:
    matrix = torch.randn(6, 4, generator=generator)
    lower = float(torch.linalg.svdvals(matrix.double())[0])
    assert prove([matrix], [lower], memory=64) == [math.inf]
    few = 12 * 4 * 6 + 32 * 4 * 4  # one matrix at a time
    found = prove([matrix] * 3, [lower] * 3, memory=few)
    assert found == prove([matrix] * 3, [lower] * 3)
    assert all(math.isfinite(value) for value in found)

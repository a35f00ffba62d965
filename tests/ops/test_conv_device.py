"""Brackets of convolutions as they are found on a device, which every device can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.ops._conv_ascent import start_vectors
from lipfast.ops._conv_bracket import Budget, NativeBracket
from lipfast.ops._conv_device import device_brackets
from lipfast.ops._conv_proofs import prove, prove_grams
from lipfast.ops._conv_symbols import symbol_stack, top_vectors
from lipfast.ops._conv_upper import native_brackets
from lipfast.reference.conv_norms import symbol_maximum
from tests.support.conv_cases import draw, together
from tests.support.pretended_device import COUNTS, on_device, pretended_device

BUDGET = Budget(rtol=1e-3, seed=0, max_passes=300, max_cells=100_000, memory=1 << 30)
SVD_ERROR = 1e-13
SHAPES = [
    *[(1, 3, 1, 1, 2, 3), (2, 3, 3, 1, 4, 5), (5, 3, 3, 1, 1, 1), (1, 2, 2, 2, 2, 3)],
    *[(1, 4, 4, 1, 8, 24), (3, 2, 1, 1, 1, 4)],
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def brackets(
    taps: list[Tensor], budget: Budget = BUDGET, grid: tuple[int, ...] = (0, 0, 0)
) -> list[NativeBracket]:
    return device_brackets(taps, budget, [None] * len(taps), list(grid) * len(taps))


def grid_maximum(taps: Tensor, points: int) -> float:
    """The largest singular value on a grid of frequencies: the supremum is above it."""
    several = [count for count in taps.shape[1:4] if count > 1]
    groups = [symbol_maximum(group.reshape(*several, *taps.shape[4:]), points) for group in taps]
    return max(float(value) for value in groups)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_suprema_are_bracketed_as_on_the_cpu(shape: tuple[int, ...]) -> None:
    taps = [normal(*shape), normal(*shape, seed=1).abs(), 1e-3 * normal(*shape, seed=2)]
    points = {1: 64, 2: 16, 3: 6}[sum(count > 1 for count in shape[1:4])]
    found = brackets(taps)
    for one, here, there in zip(taps, found, native_brackets(taps, BUDGET), strict=True):
        assert here.upper - here.lower <= BUDGET.rtol * here.upper
        assert here.lower <= there.upper and here.upper >= there.lower
        assert here.upper >= grid_maximum(one, points) * (1 - SVD_ERROR)
        assert here.method == "cholesky" and here.cells > 0


def test_the_lower_value_is_attained() -> None:
    taps = normal(2, 3, 2, 1, 3, 4)
    (found,) = brackets([taps])
    phases = torch.exp(
        2j * math.pi * sum(
            torch.arange(count).reshape([-1 if axis == i else 1 for i in range(3)]).double()
            * found.frequency[axis]
            for axis, count in enumerate(taps.shape[1:4])
        )
    )  # fmt: skip
    symbol = (taps[found.group] * phases[..., None, None]).sum((0, 1, 2))
    left, right = (torch.complex(*vector.chunk(2)) for vector in (found.left, found.right))
    image = symbol.mH @ left
    assert float(image.norm() / left.norm()) == pytest.approx(found.lower, rel=1e-12)
    torch.testing.assert_close(image / image.norm(), right)


def test_grids_are_exact() -> None:
    taps = normal(1, 3, 3, 1, 3, 3)
    (found,) = brackets([taps], grid=(4, 5, 1))
    theta = [2 * math.pi * torch.arange(size).double() / size for size in (4, 5)]
    waves = [torch.exp(1j * axis[:, None] * torch.arange(3)) for axis in theta]
    symbols = torch.einsum("pa,qb,abnm->pqnm", *waves, taps[0, :, :, 0].to(torch.complex128))
    truth = float(torch.linalg.svdvals(symbols)[..., 0].max())
    assert found.lower <= truth * (1 + SVD_ERROR) and found.upper >= truth * (1 - SVD_ERROR)
    assert found.upper - found.lower <= BUDGET.rtol * found.upper


def test_zero_tiny_and_huge_taps() -> None:
    base = normal(1, 3, 1, 1, 2, 3)
    (known,) = brackets([base])
    found = brackets([base * scale for scale in (0.0, 1e-320, 1e-300, 1e300)])
    assert found[0].lower == found[0].upper == 0.0
    assert 0 < found[1].lower <= found[1].upper < 1e-318
    for bracket, scale in zip(found[2:], (1e-300, 1e300), strict=True):
        assert bracket.lower == pytest.approx(known.lower * scale)
        assert bracket.upper == pytest.approx(known.upper * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_of_zeros_alone_and_beside_others(shape: tuple[int, ...]) -> None:
    taps = [torch.zeros(shape), normal(*shape).float(), torch.zeros(shape)]
    for points in ((0, 0, 0), (5, 5, 5)):
        sizes = zip(points, shape[1:4], strict=True)
        grid = tuple(1 if points[0] and axis == 1 else size for size, axis in sizes)
        found = brackets(taps, BUDGET._replace(rtol=0.1), grid)
        assert [bracket.upper for bracket in found[::2]] == [0.0, 0.0] < [found[1].lower]
        for bracket in found:
            assert math.hypot(*bracket.left.tolist()) == pytest.approx(1.0)


def test_the_top_vector_of_zero_is_the_start() -> None:
    start = start_vectors(2, 4, 0, torch.zeros(1, dtype=torch.float64))
    gram = torch.diag_embed(torch.tensor([[0.0] * 4, [1.0] * 4])).to(torch.complex128)
    values, vectors = top_vectors(gram, start, 4)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(vectors, start / start.norm(dim=1, keepdim=True))


def test_a_symbol_that_vanishes_on_the_grid() -> None:
    difference = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1, 1)
    (found,) = brackets([difference], grid=(1, 1, 1))
    assert 0.0 <= found.lower <= found.upper < 1e-12


def test_budget_and_memory_leave_a_proved_bound() -> None:
    taps = [normal(1, 3, 3, 1, 6, 8)]
    (full,), (few,) = brackets(taps), brackets(taps, BUDGET._replace(max_cells=20))
    (none,) = brackets(taps, BUDGET._replace(memory=1000))
    (small,) = brackets(taps, BUDGET._replace(memory=100_000))
    assert few.cells < full.cells
    assert full.lower <= few.upper <= 1.6 * full.upper
    assert none.method == "holder" and full.lower <= none.upper <= 10 * full.lower
    assert small.upper == pytest.approx(full.upper, rel=1e-3) and small.method == "cholesky"
    (asked,) = brackets(taps, BUDGET._replace(max_cells=0))
    assert asked.upper == math.inf and asked.lower == pytest.approx(full.lower, rel=1e-3)


def test_a_start_leads_to_the_maximum() -> None:
    taps = normal(3, 3, 3, 1, 4, 5)
    (cold,) = brackets([taps])
    start = torch.cat([torch.tensor([float(cold.group)]).double(), cold.frequency, cold.left])
    near = taps + 1e-4 * normal(*taps.shape, seed=1)
    for cells in (BUDGET.max_cells, 0):
        (warm,) = device_brackets([near], BUDGET._replace(max_cells=cells), [start], [0, 0, 0])
        assert warm.lower == pytest.approx(cold.lower, rel=1e-3)
        assert warm.upper == math.inf if cells == 0 else warm.upper <= warm.lower * (1 + 1e-3)


def of_symbols(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds proved from symbols, and the truth; targets are relative to that."""
    real, imaginary = normal(5, 7, 9), normal(5, 7, 9, seed=1)
    b = torch.complex(real, imaginary)
    truth = torch.linalg.svdvals(b)[:, 0]
    return prove(real, imaginary, b @ b.mH, truth * targets), truth


def of_products(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds proved from products of taps, and the truth."""
    stack = symbol_stack([normal(2, 3, 3, 1, 7, 9)], [8, 8, 1], with_products=True)
    at = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([[i, 3, 0] for i in range(5)])
    exact = torch.complex(*stack.at(at[0], stack.phases(at[1])))
    truth = torch.linalg.svdvals(exact)[:, 0]
    return prove_grams(stack, stack.gram_errors(), at, truth * targets)[0], truth


@pytest.mark.parametrize("proof", [of_symbols, of_products])
def test_a_wrong_factor_proves_nothing_false(
    proof: Callable[[Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that emulates float64 may be off, or say that it succeeded when it did not."""
    ones = torch.ones(5, dtype=torch.float64)
    honest, truth = proof(ones * (1 + 1e-6))
    assert bool((honest >= truth).all()) and bool((honest <= truth * (1 + 2e-6)).all())
    assert proof(ones * (1 - 1e-6))[0].tolist() == [math.inf] * 5
    factor = torch.linalg.cholesky_ex

    def off(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        factors, failures = factor(shifted, upper=upper)
        return factors * (1 + 1e-4), failures

    def lying(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        return torch.ones_like(shifted), torch.zeros(len(shifted), dtype=torch.int32)

    for library in (off, lying):
        monkeypatch.setattr(torch.linalg, "cholesky_ex", library)
        for goal in (0.5, 1 + 1e-9):
            found, truth = proof(ones * goal)
            assert bool((found >= truth * (1 - 1e-14)).all())


def test_grams_are_as_exact_as_is_said() -> None:
    taps = normal(2, 3, 3, 1, 3, 4)
    stack = symbol_stack([taps], [8, 8, 1], with_products=True)
    centres = torch.tensor([[i, j, 0] for i in range(8) for j in range(8)])
    symbols = torch.ones(64, dtype=torch.long)
    b = torch.complex(*stack.at(symbols, stack.phases(centres)))
    errors = torch.linalg.matrix_norm(stack.grams(symbols, centres) - b @ b.mH, 2)
    assert bool((errors <= stack.gram_errors()[1] + 1e-14).all())
    assert float(stack.gram_errors().max()) < 1e-10


def test_memory_decides_how_many_kernels_go_together() -> None:
    """Products of all kernels, of two at a time, of none; the same brackets."""
    taps = [normal(1, 3, 3, 1, 6, 8, seed=seed) for seed in range(5)]
    together = brackets(taps)
    for memory in (20_000, 7_400):
        for here, there in zip(
            together, brackets(taps, BUDGET._replace(memory=memory)), strict=True
        ):
            assert here.method == there.method == "cholesky"
            assert here.upper - here.lower <= BUDGET.rtol * here.upper
            assert there.upper == pytest.approx(here.upper, rel=1e-3)


def test_symbols_are_as_exact_as_is_said() -> None:
    """Against the same sums with phases of 1/8 turns, which are exact but for a root of two."""
    taps = normal(2, 3, 3, 1, 3, 4)
    stack = symbol_stack([taps], [8, 8, 1])
    centres = torch.tensor([[i, j, 0] for i in range(8) for j in range(8)])
    symbols = torch.ones(64, dtype=torch.long)
    parts = stack.at(symbols, stack.phases(centres))
    eighths = torch.exp(0.25j * math.pi * torch.arange(8).double())
    waves = eighths[(centres[:, None] * stack.offsets).sum(-1) % 8]
    exact = torch.einsum("pt,tnm->pnm", waves, stack.taps[1].to(torch.complex128))
    errors = torch.linalg.matrix_norm(torch.complex(*parts) - exact, 2)
    assert bool((errors <= stack.errors()[1] + 1e-15).all())


def test_lanczos_finds_the_top() -> None:
    b = torch.complex(normal(6, 10, 12), normal(6, 10, 12, seed=1))
    gram = b @ b.mH
    values, vectors = top_vectors(gram, start_vectors(6, 10, 0, gram.real), 10)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram)[:, -1])
    torch.testing.assert_close((gram @ vectors[:, :, None])[:, :, 0], values[:, None] * vectors)


@pytest.fixture(scope="module")
def on_the_device() -> tuple[Any, Any]:
    """Convolutions of every kind, and their brackets on a pretended device."""
    return device_norms(6, seed=11)


def device_norms(count: int, seed: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    cases = [draw(generator) for _ in range(count)]
    with pretended_device():
        kernels = [on_device(case.kernel) for case in cases]
        return cases, lipfast.conv_norms(kernels, **together(cases))


@pytest.mark.long
def test_many_generated_convolutions_hold_the_svd() -> None:
    for seed in range(3):
        test_generated_convolutions_hold_the_svd(device_norms(20, seed))


def test_generated_convolutions_hold_the_svd(on_the_device: tuple[Any, Any]) -> None:
    cases, norms = on_the_device
    fields = [norms.lower, norms.upper, norms.certified, norms.cells, *norms.supremum]
    fields += [*norms.right, *norms.left, *norms.frequency, *norms.maximum]
    assert {value.device.type for value in fields} == {"cuda"}
    assert all(norms.certified.tolist())
    values = zip(cases, norms.lower.tolist(), norms.upper.tolist(), strict=True)
    for case, lower, upper in values:
        value = float(torch.linalg.svdvals(case.matrix)[0])
        assert lower <= value * (1 + SVD_ERROR), case.options
        assert upper >= value * (1 - SVD_ERROR), case.options
        assert lower >= value * (1 - 1e-3), case.options


def test_a_later_call_on_the_device_starts_there(on_the_device: tuple[Any, Any]) -> None:
    cases, norms = on_the_device
    with pretended_device():
        kernels = [on_device(case.kernel) for case in cases]
        again = lipfast.conv_norms(kernels, **together(cases), start=norms)
    assert "difference" in again.method
    torch.testing.assert_close(again.lower.tolist(), norms.lower.tolist(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 12])
def test_launches_do_not_grow_with_the_kernels_of_a_shape(count: int) -> None:
    taps = [normal(1, 3, 3, 1, 6, 8, seed=seed) for seed in range(count)]
    with pretended_device():
        there = [on_device(tensor) for tensor in taps]
        COUNTS.clear()
        brackets(there, BUDGET._replace(rtol=1e-2))
    assert COUNTS.ops["tap_products"] == 1
    assert COUNTS.launches <= 8000 and COUNTS.syncs <= 120


def test_mixed_devices_and_bad_numbers_are_refused() -> None:
    kernel = torch.ones(2, 3, 3)
    bad = kernel.clone()
    bad[1, 1, 1] = math.nan
    known = lipfast.conv_norms([kernel], input_sizes=5)
    with pretended_device():
        there = on_device(kernel)
        with pytest.raises(ArgumentError, match="kernel 1: is on cpu, expected cuda:0"):
            lipfast.conv_norms([there, kernel], input_sizes=5)
        with pytest.raises(ArgumentError, match="start: kernel 0: is on cpu, expected cuda:0"):
            lipfast.conv_norms([there], input_sizes=5, start=known)
        with pytest.raises(NonFiniteError, match="kernel 1"):
            lipfast.conv_norms([there, on_device(bad)], input_sizes=5)

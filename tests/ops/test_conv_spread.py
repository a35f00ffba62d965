"""How far Gram matrices are from their mean: proved, and what cells cost with it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from lipfast.ops._conv_cells import cells_of
from lipfast.ops._conv_queued import QueuedSuprema
from lipfast.ops._conv_spread import spread_at_cells, spread_of_products
from lipfast.ops._conv_symbols import SymbolStack, symbol_stack
from lipfast.reference.conv_norms import symbol_maximum

SHAPES = [
    *[(1, 3, 1, 1, 2, 3), (2, 3, 3, 1, 4, 5), (1, 2, 2, 2, 2, 3), (1, 5, 5, 1, 2, 2)],
    *[(3, 2, 1, 1, 1, 4), (1, 3, 3, 1, 8, 8)],
]
SVD_ERROR, RTOL = 1e-13, 1e-3


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(side: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(side, side, seed=seed))[0]


def flat_taps(shape: tuple[int, ...]) -> list[Tensor]:
    """Kernels whose symbols have the same singular values at all frequencies."""
    _, *axes, n, m = shape
    middle = tuple(count // 2 for count in axes)
    made = []
    for tap in (torch.eye(n, m).double(), orthogonal(max(n, m))[:n, :m], normal(n, m)):
        taps = torch.zeros(shape).double()
        taps[(slice(None), *middle)] = tap
        made.append(taps)
    # Projections on complementary spaces, tap by tap along the first axis.
    basis = orthogonal(m, seed=1)
    taps = torch.zeros(shape).double()
    for place, columns in enumerate(torch.tensor_split(basis, axes[0], 1)):
        taps[:, place, 0, 0] = (columns @ columns.T)[:n]
    return [*made, taps]


def stack_of(taps: list[Tensor]) -> SymbolStack:
    cells = cells_of(taps[0].shape[1:4], (0, 0, 0))
    return symbol_stack(torch.stack(taps), cells.periods, with_products=True)


def deviations(stack: SymbolStack, count: int) -> Tensor:
    """(N,): the largest at zero and some random frequencies."""
    generator = torch.Generator().manual_seed(0)
    theta = 2 * math.pi * torch.rand(count, 3, generator=generator, dtype=torch.float64)
    theta[0] = 0
    waves = torch.exp(1j * (theta @ stack.offsets.double().T))
    symbols = torch.einsum("pt,gtnm->gpnm", waves, stack.taps.to(torch.complex128))
    grams = symbols @ symbols.mH
    mean = torch.einsum("gtnm,gtkm->gnk", stack.taps, stack.taps)
    return torch.linalg.matrix_norm(grams - mean[:, None], 2).amax(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spreads_are_never_below(shape: tuple[int, ...]) -> None:
    taps = [normal(*shape), normal(*shape, seed=1).abs(), *flat_taps(shape)]
    taps += [flat + 0.01 * normal(*shape, seed=2) for flat in flat_taps(shape)]
    stack = stack_of(taps)
    errors, cells = stack.gram_errors(), cells_of(shape[1:4], (0, 0, 0))
    truth = deviations(stack, 150)
    coarse = spread_of_products(stack, errors)
    close = spread_at_cells(stack, cells, errors, seed=0, memory=1 << 30)
    for found in (coarse, close):
        assert bool((found >= truth * (1 - SVD_ERROR)).all())
    # cos 2D is 0.92, and 0.38 on three axes.
    loose = 4 if shape[3] > 1 else 1.5
    assert bool((close <= loose * truth + 16 * errors).all())
    in_parts = spread_at_cells(stack, cells, errors, seed=0, memory=50_000)
    torch.testing.assert_close(in_parts, close, rtol=1e-6, atol=1e-12)


def test_nothing_is_proved_by_a_library_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of([normal(1, 3, 3, 1, 2, 3)])

    def failing(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(shifted), torch.ones(len(shifted), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    cells = cells_of((3, 3, 1), (0, 0, 0))
    found = spread_at_cells(stack, cells, stack.gram_errors(), seed=0, memory=1 << 30)
    assert found.tolist() == [math.inf]


def grid_maximum(taps: Tensor, points: int) -> float:
    several = [count for count in taps.shape[1:4] if count > 1]
    groups = [symbol_maximum(group.reshape(*several, *taps.shape[4:]), points) for group in taps]
    return max(float(value) for value in groups)


def brackets(taps: list[Tensor], *, again: bool = False) -> list[tuple[float, float]]:
    options = {"rtol": RTOL, "seed": 0, "memory": 1 << 30}
    return QueuedSuprema(torch.stack(taps), (0, 0, 0), again=again, **options).brackets()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flat_symbols_are_bounded_at_once(shape: tuple[int, ...]) -> None:
    taps = flat_taps(shape)
    taps += [own.float().double() for own in taps]
    points = {1: 64, 2: 12, 3: 6}[sum(count > 1 for count in shape[1:4])]
    for one, (lower, upper) in zip(taps, brackets(taps), strict=True):
        assert upper >= grid_maximum(one, points) * (1 - SVD_ERROR)
        assert upper - lower <= 0.5 * RTOL * upper


@pytest.mark.parametrize("size", [1e-2, 0.2])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 2, 3), (1, 3, 3, 1, 4, 4)], ids=str)
def test_nearly_flat_symbols_take_the_second_schedule(shape: tuple[int, ...], size: float) -> None:
    noise = normal(*shape, seed=3) / math.sqrt(shape[5] * math.prod(shape[1:4]))
    taps = [own + size * noise for own in flat_taps(shape)]
    points = {1: 256, 2: 32}[sum(count > 1 for count in shape[1:4])]
    found = zip(taps, brackets(taps), brackets(taps, again=True), strict=True)
    for one, first, (lower, upper) in found:
        truth = grid_maximum(one, points) * (1 - SVD_ERROR)
        assert min(first[1], upper) >= truth and first[0] <= upper * (1 + SVD_ERROR)
        assert upper - lower <= RTOL * upper


def test_kernels_of_a_model_that_begins_with_identities() -> None:
    """As `nn.init.dirac_` makes them, in groups as well."""
    for groups in (1, 2):
        kernel = nn.init.dirac_(torch.empty(4, 4 // groups, 3, 3), groups)
        taps = kernel.reshape(groups, 4 // groups, 4 // groups, 3, 3).permute(0, 3, 4, 1, 2)
        ((lower, upper),) = brackets([taps.reshape(groups, 3, 3, 1, 4 // groups, -1).double()])
        assert 1 - 1e-9 <= lower <= 1 <= upper <= 1 + 0.5 * RTOL


@pytest.mark.long
def test_bounds_of_many_kernels_are_never_below() -> None:
    """Flat and other kernels with noise of all sizes, by both schedules."""
    points = {1: 512, 2: 40, 3: 10}
    for seed in range(80):
        draw = random.Random(seed)
        shape = draw.choice(SHAPES)
        others = [normal(*shape, seed=seed), normal(*shape, seed=seed).abs()]
        size = 10 ** draw.uniform(-5, 0)
        taps = draw.choice([*flat_taps(shape), *others]) + size * normal(*shape, seed=seed + 1)
        truth = grid_maximum(taps, points[sum(count > 1 for count in shape[1:4])])
        for again in (False, True):
            ((lower, upper),) = brackets([taps], again=again)
            assert upper >= truth * (1 - SVD_ERROR) and lower <= upper * (1 + SVD_ERROR)

"""Brackets of many networks' convolutions from a fixed schedule: proved whatever it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipfast.ops import _conv_leaves, _conv_proofs
from lipfast.ops._conv_cells import CYCLE, cells_of
from lipfast.ops._conv_leaves import Exploration, Places, cells_looked_at, last_level
from lipfast.ops._conv_operator import conv_operator
from lipfast.ops._conv_queued import QueuedSuprema
from lipfast.ops._conv_symbols import symbol_stack
from lipfast.ops.conv_norms import conv_norms
from lipfast.ops.conv_norms_later import ConvNorm, ConvNormsLater
from lipfast.reference.conv_norms import symbol_maximum
from tests.support.conv_cases import OPTIONS, STRUCTURED, Case, draw
from tests.support.pretended_device import Counts, on_device, pretended_device

SVD_ERROR = 1e-13
RTOL = 1e-3
SHAPES = [
    *[(1, 3, 1, 1, 2, 3), (2, 3, 3, 1, 4, 5), (5, 3, 3, 1, 1, 1), (1, 2, 2, 2, 2, 3)],
    *[(1, 4, 4, 1, 8, 24), (3, 2, 1, 1, 1, 4), (1, 5, 5, 1, 2, 2)],
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def suprema(
    taps: list[Tensor], grid: tuple[int, ...] = (0, 0, 0), rtol: float = RTOL
) -> list[tuple[float, float]]:
    queued = QueuedSuprema(torch.stack(taps), grid, rtol=rtol, seed=0, memory=1 << 30)
    return queued.brackets()


def grid_maximum(taps: Tensor, points: int) -> float:
    """The largest singular value on a grid of frequencies: the supremum is above it."""
    several = [count for count in taps.shape[1:4] if count > 1]
    groups = [symbol_maximum(group.reshape(*several, *taps.shape[4:]), points) for group in taps]
    return max(float(value) for value in groups)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_suprema_are_bracketed(shape: tuple[int, ...]) -> None:
    taps = [normal(*shape), normal(*shape, seed=1).abs(), 1e-3 * normal(*shape, seed=2)]
    points = {1: 64, 2: 12, 3: 6}[sum(count > 1 for count in shape[1:4])]
    for one, (lower, upper) in zip(taps, suprema(taps), strict=True):
        assert 0 < upper - lower <= 0.5 * RTOL * upper
        assert upper >= grid_maximum(one, points) * (1 - SVD_ERROR)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_cells_gives_a_bound(
    shape: tuple[int, ...], split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only how tight it is depends on what is split."""
    monkeypatch.setattr(_conv_leaves, "_SPLIT", dict.fromkeys((1, 2, 3), (split,)))
    taps = [normal(*shape, seed=seed) for seed in range(3)]
    taps += [torch.zeros(shape).double().index_fill_(1, torch.tensor([1]), 0.5)]
    points = {1: 64, 2: 12, 3: 6}[sum(count > 1 for count in shape[1:4])]
    for one, (lower, upper) in zip(taps, suprema(taps), strict=True):
        assert lower <= upper and upper >= grid_maximum(one, points) * (1 - SVD_ERROR)


@pytest.mark.parametrize("split", [1, 3, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leaves_cover_half_of_the_torus(
    shape: tuple[int, ...], split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conv_leaves, "_SPLIT", dict.fromkeys((1, 2, 3), (split,)))
    cells = cells_of(shape[1:4], (0, 0, 0))
    taps = torch.stack([normal(*shape), normal(*shape, seed=1).abs()])
    stack = symbol_stack(taps, cells.periods, with_products=True)
    found = Exploration(stack, cells, rtol=0.1, seed=0, memory=1 << 30)
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(0, CYCLE, (40, 3), generator=generator)
    points[:, cells.axes :] = 0
    points = torch.cat([points, torch.zeros(1, 3, dtype=torch.long)])
    degrees = torch.tensor([(count - 1) / 2 for count in cells.taps], dtype=torch.float64)
    for kernel in range(2):
        for group in range(shape[0]):
            own = found.leaves.symbols[kernel] == kernel * shape[0] + group
            own &= found.leaves.needed[kernel]
            centres = found.leaves.centres[kernel, own]
            turns = (points[:, None] - torch.cat([centres, -centres])).double() / CYCLE
            angles = (2 * math.pi * (turns - turns.round()).abs() * degrees).sum(-1)
            most = found.cosines[own].clamp(-1, 1).acos().repeat(2)
            assert bool((angles <= most).any(1).all())


def test_the_last_level_is_what_is_asked_for() -> None:
    cells = cells_of((3, 3, 1), (0, 0, 0))
    for rtol in (1e-1, 1e-2, 1e-3, 1e-4):
        level = last_level(cells, rtol)
        assert cells.cosine(level) >= 1 - 0.25 * rtol > cells.cosine(level - 1)
    assert last_level(cells_of((3, 3, 1), (5, 5, 1)), 1e-3) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cells_are_counted_beforehand(shape: tuple[int, ...]) -> None:
    cells = cells_of(shape[1:4], (0, 0, 0))
    stack = symbol_stack(normal(1, *shape), cells.periods, with_products=True)
    looked_at = []
    look = Exploration._looked_at

    def counted(self: Exploration, symbols: Tensor, *rest: Tensor, steps: int) -> Places:
        looked_at.append(symbols.shape[1])
        return look(self, symbols, *rest, steps=steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exploration, "_looked_at", counted)
        found = Exploration(stack, cells, rtol=RTOL, seed=0, memory=1 << 30)
    # The last look is at places that were looked at before.
    assert sum(looked_at[:-1]) == cells_looked_at(cells, shape[0], shape[4], RTOL)
    assert found.leaves.symbols.shape[1] < sum(looked_at)
    assert cells_looked_at(cells, shape[0], 512, RTOL) >= sum(looked_at[:-1])


def test_grids_are_exact() -> None:
    taps = [normal(2, 3, 3, 1, 3, 3, seed=seed) for seed in range(3)]
    theta = [2 * math.pi * torch.arange(size).double() / size for size in (4, 5)]
    waves = [torch.exp(1j * axis[:, None] * torch.arange(3)) for axis in theta]
    for one, (lower, upper) in zip(taps, suprema(taps, (4, 5, 1)), strict=True):
        whole = one[:, :, :, 0].to(torch.complex128)
        symbols = torch.einsum("pa,qb,gabnm->gpqnm", *waves, whole)
        truth = float(torch.linalg.svdvals(symbols)[..., 0].max())
        assert lower <= truth * (1 + SVD_ERROR) and upper >= truth * (1 - SVD_ERROR)
        assert upper - lower <= RTOL * upper


def test_zero_tiny_and_huge_taps() -> None:
    base = normal(1, 3, 1, 1, 2, 3)
    ((below, above),) = suprema([base])
    found = suprema([base * scale for scale in (0.0, 1e-320, 1e-300, 1e300)])
    assert found[0] == (0.0, 0.0)
    assert 0 < found[1][0] <= found[1][1] < 1e-318
    for (lower, upper), scale in zip(found[2:], (1e-300, 1e300), strict=True):
        assert lower == pytest.approx(below * scale) and upper == pytest.approx(above * scale)


def test_a_library_that_fails_leaves_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    taps = [normal(1, 3, 3, 1, 2, 3)]
    ((known, _),) = suprema(taps)
    factor = torch.linalg.cholesky_ex

    def failing(shifted: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
        factors, failures = factor(shifted, upper=upper)
        failures[-1] = 1
        return factors, failures

    monkeypatch.setattr(_conv_proofs.torch.linalg, "cholesky_ex", failing)
    assert suprema(taps) == [(known, math.inf)]


def some_kernels() -> Tensor:
    """One that is flat, one of Gaussian numbers, and one that is nearly flat."""
    weights = torch.zeros(3, 8, 8, 3, 3)
    weights[0, :, :, 1, 1] = torch.eye(8)
    weights[1] = normal(8, 8, 3, 3).float() / 8
    weights[2] = weights[0] + 0.04 * weights[1]
    return weights


def test_nearly_flat_symbols_are_looked_at_again() -> None:
    options = one_of({**OPTIONS, "padding": 1}, 2)
    weights = some_kernels()
    conv = conv_operator(weights[0], "kernel", **options)
    later = ConvNormsLater(conv, weights, rtol=RTOL, seed=0, memory=1 << 30)
    first = later.norms()
    assert [norm.reached for norm in first] == [True, True, False]
    assert first[0].lower <= 1 <= first[0].upper <= 1 + RTOL
    later.look_again([2])
    second = later.norms()
    assert second[2].reached and second[2].upper < first[2].upper
    assert second[2].lower == first[2].lower and second[:2] != first[:2]  # starts are made anew
    for one, other in zip(first[:2], second[:2], strict=True):
        assert (one.lower, one.upper) == (other.lower, other.upper)
    truth = conv_norms(list(weights), input_sizes=[4] * 3, padding=1)
    assert second[2].upper >= float(truth.lower[2])


def test_without_memory_nothing_is_looked_at_again() -> None:
    weights = some_kernels()
    conv = conv_operator(weights[0], "kernel", **one_of({**OPTIONS, "padding": 1}, 2))
    later = ConvNormsLater(conv, weights, rtol=RTOL, seed=0, memory=1 << 20)
    known = [(norm.lower, norm.upper) for norm in later.norms()]
    later.look_again([2])
    assert [(norm.lower, norm.upper) for norm in later.norms()] == known


def test_kernels_without_memory_for_products() -> None:
    """Symbols are formed one by one then."""
    weights = normal(2, 6, 6, 3, 3).float()
    conv = conv_operator(weights[0], "kernel", **one_of(OPTIONS, 2))
    assert ConvNormsLater.takes(conv, 7_000) and not ConvNormsLater.takes(conv, 6_000)
    known = ConvNormsLater(conv, weights, rtol=RTOL, seed=0, memory=1 << 30).norms()
    found = ConvNormsLater(conv, weights, rtol=RTOL, seed=0, memory=7_000).norms()
    for one, other in zip(found, known, strict=True):
        assert one.certified and one.reached
        assert one.upper == pytest.approx(other.upper, rel=1e-6)


def test_memory_decides_how_many_go_together() -> None:
    taps = torch.stack([normal(1, 3, 1, 1, 6, 8, seed=seed) for seed in range(5)])
    together = QueuedSuprema(taps, [0, 0, 0], rtol=RTOL, seed=0, memory=1 << 30).brackets()
    for memory in (8_000, 5_000):
        apart = QueuedSuprema(taps, [0, 0, 0], rtol=RTOL, seed=0, memory=memory).brackets()
        for one, other in zip(together, apart, strict=True):
            assert one == pytest.approx(other, rel=1e-9)


def one_of(options: dict[str, object], axes: int) -> dict[str, object]:
    """Options of `conv_norms` as `conv_operator` takes them."""
    sizes = options["input_sizes"]
    size = sizes if isinstance(sizes, tuple) else (4,) * axes
    rest = {key: value for key, value in options.items() if key != "input_sizes"}
    return {**rest, "input_size": size}


def norms_of(case: Case, scales: tuple[float, ...]) -> list[ConvNorm] | None:
    """Of a case's kernel times some numbers; None for one tap."""
    options = one_of({**OPTIONS, **case.options}, case.kernel.dim() - 2)
    conv = conv_operator(case.kernel, "kernel", **options)
    if not ConvNormsLater.takes(conv, 1 << 30):
        return None
    weights = torch.stack([case.kernel * scale for scale in scales])
    with pretended_device() as counts:
        later = ConvNormsLater(
            conv_operator(on_device(weights)[0], "kernel", **options),
            on_device(weights),
            rtol=RTOL,
            seed=0,
            memory=1 << 30,
        )
        assert counts.syncs == 0
        found = later.norms()
        assert counts.syncs == 1
    return found


def check_cases(seed: int, count: int, families: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    looked_at = 0
    while looked_at < count:
        case = draw(generator, families=families)
        found = norms_of(case, (1.0, -0.5))
        if found is None or not bool(case.kernel.any()):
            continue
        looked_at += 1
        truth = float(torch.linalg.svdvals(case.matrix)[0])
        for norm, value in zip(found, (truth, 0.5 * truth), strict=True):
            assert norm.certified and norm.lower <= value * (1 + SVD_ERROR), case.options
            assert norm.upper >= value * (1 - SVD_ERROR), case.options
            assert norm.lower >= value * (1 - 2e-3), case.options


@pytest.mark.parametrize("families", [("gaussian", "low-pass", "integers"), STRUCTURED])
def test_generated_convolutions_hold_the_svd(families: tuple[str, ...]) -> None:
    check_cases(3, 12, families)


@pytest.mark.long
def test_many_generated_convolutions_hold_the_svd() -> None:
    for seed in range(10):
        check_cases(seed, 40, ("gaussian", "low-pass", "integers", "sparse", *STRUCTURED))


def asked(count: int, size: tuple[int, ...]) -> Counts:
    weights = torch.randn(count, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    options = one_of({**OPTIONS, "input_sizes": size, "padding": 1}, 2)
    with pretended_device() as counts:
        there = on_device(weights)
        conv = conv_operator(there[0], "kernel", **options)
        counts.clear()
        ConvNormsLater(conv, there, rtol=RTOL, seed=0, memory=1 << 30)
        return counts


def test_launches_depend_on_the_schedule_only() -> None:
    few, many = asked(2, (5, 5)).launches, asked(12, (9, 9)).launches
    assert few == many <= 1700
    later = asked(12, (9, 9))
    assert later.syncs == later.blocking == 0
    assert later.ops["tap_products"] == 1 and later.ops["linalg_cholesky_ex"] == 1

"""Lanczos by a fixed schedule: values are those of `lanczos`, and what is unfinished is said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.lanczos import lanczos_triplets
from lipfast.estimators.jacobian.lanczos_queued import (
    QueuedNorms,
    bytes_of_steps,
    queued_norms,
    steps_of,
)
from lipfast.estimators.jacobian.linearization import Footprint, footprint
from tests.estimators.jacobian.test_lanczos import Detaching, matrix_model, with_spectrum
from tests.support.jacobian_cases import norms, perceptron, samples

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Twenty singular values at the top, apart by 1e-4.
TOP = torch.cat([1 - 1e-4 * torch.arange(20), torch.linspace(0, 0.99, 380)])


def queued(
    model: nn.Module, x: Tensor, *, again: bool = False, memory: int = 1 << 30
) -> tuple[QueuedNorms, list[bool]]:
    """What a schedule finds, and the checks."""
    checks: list[Tensor] = []
    outputs = model(x[:1]).shape[1]
    problem = SampleFunction(model.requires_grad_(False), x, outputs, (), checks)
    with differentiating():
        size = footprint(problem)
        steps = steps_of(size, x.dtype, memory, again=again)
        found = queued_norms(problem, size, steps, memory=memory)
    return found, [bool(check) for check in checks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("widths", "activation"),
    [((130, 90, 140), "relu"), ((130, 150, 140, 210), "gelu"), ((260, 140), "tanh")],
    ids=str,
)
def test_networks(widths: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    model = perceptron(*widths, activation=activation).to(dtype)
    x = samples(4, widths[0]).to(dtype)
    found, checks = queued(model, x)
    truth = norms(model, x)
    assert found.values.dtype == dtype and not found.open.any() and all(checks)
    assert float((found.values.double() / truth - 1).abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values",
    [
        torch.ones(150),
        torch.tensor([5.0] + [0.0] * 149),
        torch.tensor([5.0, 5.0] + [1.0] * 148),
        torch.cat([10.0 ** -torch.arange(60.0), torch.zeros(90)]),
        torch.linspace(0.99, 1.0, 280),
        torch.linspace(0, 1, 500).sqrt(),
        torch.cat([torch.tensor([1.0, 1 - 1e-6]), torch.linspace(0, 0.99, 298)]),
        TOP,
    ],
    ids=["flat", "rank one", "double", "decaying", "dense", "root", "near", "cluster"],
)
def test_spectra(values: Tensor, dtype: torch.dtype) -> None:
    """What the first schedule leaves, it says, and the second one finds."""
    model, x = matrix_model(with_spectrum(values.double()).to(dtype)), samples(2, len(values))
    x = x.to(dtype)
    problem = SampleFunction(model, x, len(values))
    with differentiating():
        known = lanczos_triplets(problem, footprint(problem), memory=1 << 30).values
    top = float(values.max())
    first, second = queued(model, x)[0], queued(model, x, again=True)[0]
    for found in (first, second):
        close = found.values >= known * (1 - TOLERANCE[dtype])
        assert bool((close | found.open).all())
        assert bool((found.values <= top * (1 + TOLERANCE[dtype])).all())
    assert not second.open.any()
    assert float((second.values / top - 1).abs().max()) <= TOLERANCE[dtype]


def test_a_cluster_is_unfinished_at_first() -> None:
    for dtype in (torch.float32, torch.float64):
        model, x = matrix_model(with_spectrum(TOP.double()).to(dtype)), samples(2, len(TOP))
        assert bool(queued(model, x.to(dtype))[0].open.all())


def test_what_a_start_hardly_holds_is_unfinished() -> None:
    """A first singular vector that is nearly orthogonal to the start, and far above the others."""
    side = 300
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(side, generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.randn(side, side, generator=torch.Generator().manual_seed(1)).double()
    basis[:, 0] -= start * (start @ basis[:, 0]) / (start @ start)
    right = torch.linalg.qr(basis)[0]
    values = torch.full((side,), 0.3, dtype=torch.float64)
    values[0], values[1] = 1.0, 0.99
    model = matrix_model(right @ torch.diag(values) @ right.T)
    found, _ = queued(model, samples(2, side).double())
    near = (found.values - 1).abs() <= 1e-12
    assert bool((near | found.open).all())


def test_zero_and_squares_out_of_range() -> None:
    found, _ = queued(matrix_model(torch.zeros(140, 150)), samples(2, 150))
    assert found.values.tolist() == [0, 0] and not found.open.any()
    spread = with_spectrum(torch.linspace(0.1, 1.0, 150).double())
    for size in (1e-30, 1e25):
        values = queued(matrix_model(size * spread.float()), samples(2, 150), again=True)[0].values
        torch.testing.assert_close(values, torch.full((2,), size), rtol=1e-5, atol=0)


def test_a_value_does_not_depend_on_its_block() -> None:
    model, x = perceptron(140, 150, 135, activation="relu"), samples(7, 140)
    together, checks = queued(model, x)
    apart, more = queued(model, x, memory=1)
    assert len(checks) == 1 and len(more) == 7 and all(checks + more)
    torch.testing.assert_close(apart.values, together.values, rtol=1e-5, atol=0)


def test_derivatives_that_do_not_exist_are_not_a_number() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    x = samples(3, 140)
    x[1, 4] = 0.0
    found, _ = queued(Root(), x)
    assert found.values.isnan().tolist() == [False, True, False]
    assert not bool(found.open[1])


def test_wrong_second_derivatives_are_said() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([Detaching.apply(x)] * 2, 1)

    assert queued(Model(), samples(2, 140))[1] == [False]


def test_steps_follow_the_memory() -> None:
    large = Footprint(10**6, 10**6, 4, 10**7, 10**7)
    assert steps_of(large, torch.float32, 1 << 34, again=True) == 256
    some = steps_of(large, torch.float32, 1 << 30, again=True)
    assert 64 < some < 256 and some * 4 * 10**6 <= 1 << 29
    assert steps_of(large, torch.float32, 1, again=True) == 48
    assert steps_of(large, torch.float64, 1 << 40, again=False) == 64
    small = Footprint(130, 10**4, 8, 10**5, 10**5)
    assert steps_of(small, torch.float64, 1 << 30, again=True) == 130
    assert bytes_of_steps(large, 256) > 256 * 4 * 10**6
    assert math.isfinite(bytes_of_steps(small, 130))

"""Samples that share terms of the first product: as accurate as when each is summed by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_stages import Activation, Flatten, Linear, Stage
from lipfast.reference.chain_jacobian_norms import chain_jacobian_norms as reference
from tests.support.chain_cases import (
    RELU,
    Biases,
    Weights,
    assert_close,
    average_pool,
    conv,
    draw,
    max_pool,
    mlp,
    mlp_shapes,
    samples,
)

FEWEST = 16  # samples of a batch, below which none are shared
CHAINS = [
    (7, 5, 3),  # too few units to share anything
    (7, 31, 3),
    (7, 32, 3),
    (12, 64, 1),
    (9, 65, 4),
    (30, 130, 257, 11),
    (6, 40, 31, 33, 20),
    (33, 100, 64),
    (150, 48, 60, 5),
    (2, 17, 24, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", CHAINS, ids=str)
def test_matches_the_reference(capability: str, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    weights, biases = draw(mlp_shapes(dims), dtype, networks=2)
    x = samples(80, dims[:1], dtype)
    for hidden, output in (
        (RELU, None),
        (RELU, RELU),
        (Activation("relu6"), Activation("leaky_relu", (0.01,))),
        (Activation("hardtanh", (-1.0, 0.5)), Activation("tanh")),
    ):
        stages = mlp(dims, hidden, output)
        truth = reference(x, weights, biases, stages)
        got = chain_jacobian_norms(x, weights, biases, stages)
        assert_close(got, truth, truth[1].max())


@pytest.mark.parametrize("batch", [FEWEST - 1, FEWEST, 17, 64, 65, 129, 1030])
def test_batches_around_the_sizes_of_tiles(capability: str, batch: int) -> None:
    dims = (5, 20, 70, 3)
    weights, biases = draw(mlp_shapes(dims), torch.float32)
    x = samples(batch, dims[:1], torch.float32)
    stages = mlp(dims, RELU)
    truth = reference(x, weights, biases, stages)
    got = chain_jacobian_norms(x, weights, biases, stages)
    assert_close(got, truth, truth[1].max())


def spread() -> tuple[Tensor, Weights, Biases, list[Stage]]:
    """Units that come and go with the samples."""
    dims = (6, 40, 60, 4)
    weights, biases = draw(mlp_shapes(dims), torch.float32)
    return samples(200, dims[:1], torch.float32), weights, biases, mlp(dims, RELU)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12, 1e30])
def test_large_units_that_switch_off_leave_no_rounding_behind(
    capability: str, scale: float
) -> None:
    """A unit with large weights, on in some samples: taking it out again would cost its digits."""
    x, weights, biases, stages = spread()
    weights[0][2][:, 7] *= scale
    got = chain_jacobian_norms(x, weights, biases, stages)
    truth = reference(x, weights, biases, stages)
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=0.0)
    on = truth[0] > 1e-3 * truth[0].max()
    assert scale < 1e12 or 0 < int(on.sum()) < on.numel()


@pytest.mark.parametrize("scale", [1e6, 1e15])
def test_a_large_entry_spoils_no_other_column(capability: str, scale: float) -> None:
    """Only one column of W is large in that unit: the check looks at every column."""
    x, weights, biases, stages = spread()
    weights[0][1][5, 3] *= scale
    # The layer before is off there, so that the other columns alone are seen.
    weights[0][0][3] = 0.0
    biases[0][0][3] = -1.0  # type: ignore[index]
    got = chain_jacobian_norms(x, weights, biases, stages)
    truth = reference(x, weights, biases, stages)
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)


def test_columns_of_tiny_entries_keep_their_digits(capability: str) -> None:
    """Of W's columns one alone counts: large in unit 9, tiny in all others.

    Where unit 9 is off, five others are on instead, so that those samples start from the ones
    where it is on. Columns that nobody sees hold large entries everywhere: a check of norms, not
    of columns, would be content.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    weights = [torch.zeros(40, 6), torch.randn(60, 40, generator=generator), torch.ones(4, 60)]
    weights[0][3] = torch.randn(6, generator=generator)
    biases = [torch.full((40,), -1.0), torch.zeros(60), torch.zeros(4)]
    biases[0][3] = 20.0
    middle = (x @ weights[0][3] + 20.0).sort().values[99:101]
    threshold = middle.mean()  # no sample is at a kink
    weights[1][:, 3] = 1e-7 * (0.5 + torch.rand(60, generator=generator))
    weights[1][9, 3], biases[1][9] = 1.0, -threshold
    weights[1][10:15, 3] *= -1
    biases[1][10:15] = -threshold * weights[1][10:15, 3]
    stages = mlp((6, 40, 60, 4), RELU)
    got = chain_jacobian_norms(x, [weights], [list(biases)], stages)[0]
    truth = reference(x, [weights], [list(biases)], stages)[0]
    assert 50 < int((truth < 1e-3 * truth.max()).sum()) < 150
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0.0)


def test_sums_that_overflow_are_not_shared(capability: str) -> None:
    """A unit that is off may hold what float32 cannot sum: the others' samples are right."""
    x, weights, biases, stages = spread()
    hidden = torch.relu(x @ weights[0][0].T + biases[0][0])
    on = hidden @ weights[0][1][11] + biases[0][1][11] > 0  # type: ignore[index]
    assert 0 < int(on.sum()) < len(x)
    clean = reference(x, weights, biases, stages)[0][0]
    weights[0][2][1, 11] = 3e38
    got = chain_jacobian_norms(x, weights, biases, stages)[0][0]
    torch.testing.assert_close(got[~on].double(), clean[~on], rtol=1e-5, atol=1e-7)
    assert not bool((torch.isfinite(got[on]) & (got[on] < 1e30)).any())


def test_one_pattern_for_all_and_one_for_each(capability: str) -> None:
    dims = (8, 40, 3)
    weights, biases = draw(mlp_shapes(dims), torch.float64)
    stages = mlp(dims, RELU)
    x = samples(1, (8,), torch.float64).expand(50, 8).contiguous()
    got = chain_jacobian_norms(x, weights, biases, stages)[0]
    assert bool((got == got[0, 0]).all())
    # Unit i is on in sample i alone.
    weights = [[torch.eye(40, dtype=torch.float64), torch.ones(2, 40, dtype=torch.float64)]]
    weights[0][1] *= torch.arange(1, 41)
    x = 2 * torch.eye(40, dtype=torch.float64) - 1
    got = chain_jacobian_norms(x, weights, [[None, None]], stages)[0]
    torch.testing.assert_close(
        got[0], math.sqrt(2) * torch.arange(1, 41, dtype=torch.float64), rtol=1e-14, atol=0.0
    )


def test_order_of_the_samples_changes_the_last_digits_only(capability: str) -> None:
    dims = (10, 50, 40, 5)
    weights, biases = draw(mlp_shapes(dims), torch.float32)
    x = samples(300, dims[:1], torch.float32)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    stages = mlp(dims, RELU)
    got = chain_jacobian_norms(x, weights, biases, stages)[0][0]
    other = chain_jacobian_norms(x[shuffled], weights, biases, stages)[0][0]
    torch.testing.assert_close(other, got[shuffled], rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38, 0.0])
def test_samples_that_no_direction_tells_apart(capability: str, value: float) -> None:
    """NaN, infinity, overflow and equal samples make a poor order of samples, and no crash."""
    dims = (4, 40, 3)
    weights, biases = draw(mlp_shapes(dims), torch.float32)
    x = samples(200, (4,), torch.float32)
    expected = chain_jacobian_norms(x, weights, biases, mlp(dims, RELU))[0][0]
    x[::3] = value
    got = chain_jacobian_norms(x, weights, biases, mlp(dims, RELU))[0][0]
    kept = torch.arange(200) % 3 != 0
    torch.testing.assert_close(got[kept], expected[kept], rtol=2e-6, atol=0.0)
    if math.isnan(value):
        assert bool(got[~kept].isnan().all())


def test_linear_stages_without_an_activation_between_share_nothing(capability: str) -> None:
    weights, biases = draw([(20, 6), (4, 20)], torch.float32)
    stages: list[Stage] = [Linear(), Linear()]
    x = samples(40, (6,), torch.float32)
    truth = reference(x, weights, biases, stages)
    got = chain_jacobian_norms(x, weights, biases, stages)
    assert_close(got, truth, truth[1].max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_stages_after_convolutions_share_terms(capability: str, dtype: torch.dtype) -> None:
    stages: list[Stage] = [
        conv(padding=1),
        RELU,
        max_pool(2),
        Flatten(),
        Linear(),
        RELU,
        Linear(),
        RELU,
        Linear(),
    ]
    weights, biases = draw([(7, 2, 3, 3), (40, 63), (70, 40), (5, 70)], dtype, networks=2)
    x = samples(70, (2, 6, 6), dtype)
    truth = reference(x, weights, biases, stages)
    got = chain_jacobian_norms(x, weights, biases, stages)
    assert_close(got, truth, truth[1].max())


@pytest.mark.parametrize("first", [RELU, max_pool(1), average_pool(1)], ids=str)
def test_chains_that_start_without_a_weight(capability: str, first: Stage) -> None:
    stages: list[Stage] = [first, Flatten(), Linear(), RELU, Linear()]
    weights, biases = draw([(33, 60), (11, 33)], torch.float32)
    x = samples(40, (4, 3, 5), torch.float32)
    truth = reference(x, weights, biases, stages)
    assert_close(chain_jacobian_norms(x, weights, biases, stages), truth, truth[1].max())

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.chain_jacobian_norms import (
    chain_jacobian_norms,
    chain_jacobian_norms_together,
)
from lipfast.ops.chain_stages import Activation, Flatten, Linear, MaxPool, Stage, encode_chain
from lipfast.reference.chain_jacobian_norms import chain_jacobian_norms as reference
from tests.support.chain_cases import (
    ACTIVATIONS,
    CASES,
    RELU,
    TOLERANCE,
    Biases,
    Weights,
    assert_close,
    draw,
    mlp,
    mlp_shapes,
    samples,
)

CHAINS = [
    (1, 1),
    (3, 2),
    (1, 1, 1),
    (5, 1, 7),
    (40, 64, 10),
    (40, 33, 17, 10),
    (7, 13, 5, 31, 3),
    (50, 20, 1),
    (16, 8, 6, 12),
    (100, 70, 90, 80),
    # panels of columns of which the last is half as wide, for every width of vectors
    (20, 30, 12, 9),
    (48, 9, 25),
    (11, 6, 17),
]


def networks(
    dims: tuple[int, ...], dtype: torch.dtype, count: int = 2, bias: bool = True
) -> tuple[Weights, Biases]:
    return draw(mlp_shapes(dims), dtype, networks=count, bias=bias)


RELU_MLP = mlp((0, 0, 0), RELU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", CHAINS, ids=str)
def test_matches_the_reference(capability: str, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    x = torch.randn(
        13, dims[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    for slope, output_slope, bias in [
        (0.0, 1.0, True),
        (0.1, 0.0, True),
        (1.0, 1.0, False),
        (-2.0, 1.0, False),
    ]:
        weights, biases = networks(dims, dtype, bias=bias)
        hidden, output = (Activation("leaky_relu", (value,)) for value in (slope, output_slope))
        stages = mlp(dims, hidden, output)
        spectral, frobenius = chain_jacobian_norms(x, weights, biases, stages)
        assert spectral.shape == frobenius.shape == (2, 13) and spectral.dtype == dtype
        truth = reference(x, weights, biases, stages)
        scale = truth[1].max()
        torch.testing.assert_close(
            spectral.double(),
            truth[0],
            rtol=TOLERANCE[dtype],
            atol=1e-8 * scale * (dtype == torch.float32),
        )
        torch.testing.assert_close(
            frobenius.double(),
            truth[1],
            rtol=TOLERANCE[dtype],
            atol=1e-8 * scale * (dtype == torch.float32),
        )


@cache
def case_truth(
    name: str, dtype: torch.dtype, bias: bool
) -> tuple[Weights, Biases, tuple[Tensor, Tensor]]:
    shape, stages, weight_shapes = CASES[name]
    weights, biases = draw(weight_shapes, dtype, networks=2, bias=bias)
    return weights, biases, reference(samples(5, shape, dtype), weights, biases, stages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_stages_match_the_reference(capability: str, dtype: torch.dtype, name: str) -> None:
    shape, stages, _ = CASES[name]
    x = samples(5, shape, dtype)
    for bias in (True, False):
        weights, biases, truth = case_truth(name, dtype, bias)
        got = chain_jacobian_norms(x, weights, biases, stages)
        assert_close(got, truth, truth[1].max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_match_the_reference(
    capability: str, dtype: torch.dtype, activation: Activation
) -> None:
    dims = (6, 29, 4)
    weights, biases = draw(mlp_shapes(dims), dtype)
    stages = mlp(dims, activation, activation)
    for scale in (1.0, 8.0):
        x = scale * samples(9, (6,), dtype)
        truth = reference(x, weights, biases, stages)
        got = chain_jacobian_norms(x, weights, biases, stages)
        assert_close(got, truth, truth[1].max())


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 65])
def test_batch_sizes(capability: str, batch: int, generator: torch.Generator) -> None:
    weights, biases = networks((10, 20, 5), torch.float32, count=3)
    x = torch.randn(batch, 10, generator=generator)
    spectral, _ = chain_jacobian_norms(x, weights, biases, RELU_MLP)
    assert spectral.shape == (3, batch)
    if batch:
        torch.testing.assert_close(
            spectral.double(), reference(x, weights, biases, RELU_MLP)[0], rtol=1e-5, atol=1e-7
        )


def test_derivative_at_a_kink_is_the_slope(capability: str) -> None:
    weight = [[torch.eye(2)]]
    x = torch.tensor([[0.0, 1.0], [-0.0, -1.0]])
    assert chain_jacobian_norms(x, weight, [[None]], [Linear(), Activation("leaky_relu", (0.5,))])[
        0
    ].tolist() == [[1.0, 0.5]]
    assert chain_jacobian_norms(x, weight, [[None]], [Linear(), RELU])[0].tolist() == [[1.0, 0.0]]


def test_dead_network_has_norm_zero(capability: str) -> None:
    weights = [[torch.ones(4, 3), torch.ones(2, 4)]]
    biases = [[torch.full((4,), -100.0), None]]
    spectral, frobenius = chain_jacobian_norms(torch.ones(3, 3), weights, biases, RELU_MLP)
    assert spectral.tolist() == frobenius.tolist() == [[0.0] * 3]


def test_nan_is_not_lost(capability: str, generator: torch.Generator) -> None:
    weights, biases = networks((10, 20, 5), torch.float32, count=1)
    x = torch.randn(9, 10, generator=generator)
    x[4, 3] = math.nan
    spectral, _ = chain_jacobian_norms(x, weights, biases, RELU_MLP)
    assert spectral[0].isnan().tolist() == [index == 4 for index in range(9)]


def test_independent_of_threads_and_company(capability: str, generator: torch.Generator) -> None:
    weights, biases = networks((40, 64, 10), torch.float32, count=5)
    x = torch.randn(50, 40, generator=generator)
    together = chain_jacobian_norms(x, weights, biases, RELU_MLP)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(chain_jacobian_norms(x, weights, biases, RELU_MLP)[0], together)
    finally:
        torch.set_num_threads(threads)
    for index in range(5):
        alone = chain_jacobian_norms(
            x, weights[index : index + 1], biases[index : index + 1], RELU_MLP
        )[0]
        assert torch.equal(alone[0], together[index])


def test_non_contiguous_input(generator: torch.Generator) -> None:
    weights, biases = networks((10, 20, 5), torch.float32, count=1)
    x = torch.randn(10, 9, generator=generator).T
    transposed = [[weight.T.contiguous().T for weight in weights[0]]]
    expected = chain_jacobian_norms(x.contiguous(), weights, biases, RELU_MLP)[0]
    assert torch.equal(chain_jacobian_norms(x, transposed, biases, RELU_MLP)[0], expected)


def test_opcheck(generator: torch.Generator) -> None:
    weights, biases = networks((6, 9, 4), torch.float32)
    flat_weights, flat_biases = list(chain(*weights)), list(chain(*biases))
    x = torch.randn(5, 6, generator=generator)
    torch.library.opcheck(
        torch.ops.lipfast.chain_jacobian_norms.default,
        (x, flat_weights, flat_biases, *encode_chain(RELU_MLP, mlp_shapes((6, 9, 4)))),
    )


WIDE = (300, 40, 30, 10)


def wide_problem(dtype: torch.dtype, count: int) -> tuple[Tensor, Weights, Biases]:
    weights, biases = draw(mlp_shapes(WIDE), dtype, networks=count)
    return samples(100, WIDE[:1], dtype), weights, biases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_first_layer(capability: str, dtype: torch.dtype) -> None:
    """Enough samples for the triangle of the first layer to pay."""
    x, weights, biases = wide_problem(dtype, 3)
    stages = mlp(WIDE, RELU)
    truth = reference(x, weights, biases, stages)
    assert_close(chain_jacobian_norms(x, weights, biases, stages), truth, truth[1].max())


def test_wide_first_layer_keeps_its_digits(capability: str) -> None:
    """Later layers that see only what W_1 makes small: the Gram matrix squares that ratio."""
    x, weights, _ = wide_problem(torch.float64, 1)
    u, values, v = torch.linalg.svd(weights[0][0], full_matrices=False)
    values[:] = 1.0
    values[:10] = 1e3
    weights[0][0] = (u * values) @ v
    weights[0][1] = weights[0][1] @ (torch.eye(40) - u[:, :10] @ u[:, :10].T)
    stages: list[Stage] = [Linear(), Linear(), RELU, Linear()]
    single = [weight.float() for weight in weights[0]]
    truth = reference(x, [[weight.double() for weight in single]], [[None] * 3], stages)[0]
    value = chain_jacobian_norms(x.float(), [single], [[None] * 3], stages)[0]
    torch.testing.assert_close(value.double(), truth, rtol=2e-4, atol=0.0)


def test_wide_first_layer_of_low_rank(capability: str) -> None:
    x, weights, biases = wide_problem(torch.float32, 3)
    stages = mlp(WIDE, RELU)
    weights[0][0].zero_()
    weights[1][0][5:] = weights[1][0][:1]
    weights[2][0] *= 1e-30
    spectral, frobenius = chain_jacobian_norms(x, weights, biases, stages)
    truth = reference(x, weights, biases, stages)
    assert spectral[0].abs().max() == frobenius[0].abs().max() == 0.0
    torch.testing.assert_close(spectral.double(), truth[0], rtol=1e-5, atol=0.0)
    weights[1][0][3, 7] = math.nan
    spectral, _ = chain_jacobian_norms(x, weights, biases, stages)
    assert bool(spectral[1].isnan().all()) and not bool(spectral[2].isnan().any())


def test_memory_does_not_grow_with_the_batch() -> None:
    """Beyond its results the op holds one tile per thread and the packed weights."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs: the peak of resident memory cannot be reset")
    script = """
import torch
from tests.support.chain_cases import RELU, draw, mlp, mlp_shapes
from lipfast.ops.chain_jacobian_norms import (
    chain_jacobian_norms,
    chain_jacobian_norms_together,
)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
dims = (40, 256, 256, 10)
x = torch.randn(100_000, 40)
weights, biases = draw(mlp_shapes(dims), torch.float32)
stages = mlp(dims, RELU)
chain_jacobian_norms(x[:100], weights, biases, stages)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
chain_jacobian_norms(x, weights, biases, stages)
print(peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) <= 64 * 1024  # KiB


def test_one_network_of_many_outputs(capability: str) -> None:
    dims = (140, 150, 128)
    weights, biases = draw(mlp_shapes(dims), torch.float32)
    x = samples(3, dims[:1], torch.float32)
    truth = reference(x, weights, biases, mlp(dims, RELU))
    assert_close(chain_jacobian_norms(x, weights, biases, mlp(dims, RELU)), truth, truth[1].max())


def test_nan_passes_through_pools_and_clipping(capability: str) -> None:
    shape, stages, weight_shapes = CASES["max pool"]
    weights, biases = draw(weight_shapes, torch.float32)
    x = samples(3, shape, torch.float32)
    x[1, 2, 4, 4] = math.nan
    for activation in (RELU, Activation("relu6"), Activation("hardtanh", (-1.0, 1.0))):
        chosen = [activation if stage == RELU else stage for stage in stages]
        spectral, _ = chain_jacobian_norms(x, weights, biases, chosen)
        assert spectral[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_networks_that_lie_together(name: str, bias: bool) -> None:
    shape, stages, shapes = CASES[name]
    weights, biases = draw(shapes, torch.float32, networks=3, bias=bias)
    x = samples(5, shape, torch.float32)
    stacked = [torch.stack(column) for column in zip(*weights, strict=True)]
    shifts = [
        None if own[0] is None else torch.stack(own)  # type: ignore[arg-type]
        for own in zip(*biases, strict=True)
    ]
    found = chain_jacobian_norms_together(x, stacked, shifts, stages)
    expected = chain_jacobian_norms(x, weights, biases, stages)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_bad_input_of_networks_that_lie_together() -> None:
    x, weight, bias = torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(2, 4)
    for weights, biases, message in [
        ([weight], [], "1 weights and 0 biases"),
        ([weight], [bias[:1]], r"of \[1, 2\] networks"),
        ([weight[:0]], [bias[:0]], r"of \[0\] networks"),
        ([weight], [bias[:, :3]], r"network 0, stage 0: expected a bias \(4,\)"),
        ([weight.double()], [bias], "network 0, stage 0: weights must have the dtype of x"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            chain_jacobian_norms_together(x, weights, biases, [Linear()])


def test_bad_input() -> None:
    weights, biases = networks((6, 9, 4), torch.float32)
    stages, x = RELU_MLP, torch.ones(2, 6)
    bad = [
        (
            torch.ones(2, 5),
            weights,
            biases,
            stages,
            r"network 0, stage 0: expected a weight \(n_out, 5\)",
        ),
        (x.double(), weights, biases, stages, "dtype of x"),
        (x[0], weights, biases, stages, "expected samples"),
        (x, weights, biases[:1], stages, "networks"),
        (x, weights, biases, [Linear()], "2 weights"),
        (x, [weights[0], weights[0][:1]], biases, stages, "network 1"),
        (x, weights, [[torch.ones(3), None]] * 2, stages, r"expected a bias \(9,\)"),
        (x.long(), weights, biases, stages, "int64"),
    ]
    for given, w, b, s, message in bad:
        with pytest.raises(ArgumentError, match=message):
            chain_jacobian_norms(given, w, b, s)
    numbers, parameters = encode_chain(RELU_MLP, mlp_shapes((6, 9, 4)))
    twice = [weights[0][0]] * 2
    with pytest.raises(ArgumentError, match="1025 outputs"):
        chain_jacobian_norms(torch.ones(1, 1), [[torch.ones(1025, 1)]], [[None]], [Linear()])
    dilated = MaxPool((2, 2), (1, 1), (1, 1), (5, 5))
    with pytest.raises(ArgumentError, match="wholly in the padding"):
        chain_jacobian_norms(
            torch.ones(1, 1, 4, 4),
            [[torch.ones(1, 1)]],
            [[None]],
            [dilated, Flatten(), Linear()],
        )
    with pytest.raises(RuntimeError, match="stage 2: expected a weight n x 9, got 9 x 6"):
        torch.ops.lipfast.chain_jacobian_norms(x, twice, [torch.empty(0)] * 2, numbers, parameters)

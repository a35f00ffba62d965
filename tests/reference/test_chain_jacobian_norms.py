from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.chain_stages import (
    Activation,
    AveragePool,
    ConvStage,
    Flatten,
    Linear,
    MaxPool,
    Stage,
    output_shape,
)
from lipfast.reference.chain_jacobian_norms import chain_jacobians
from tests.support.chain_cases import (
    ACTIVATIONS,
    CASES,
    autograd_jacobians,
    check_case,
    draw,
    max_pool,
    mlp,
    mlp_shapes,
    samples,
    torch_function,
)


def assert_like_autograd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], stages: list[Stage]
) -> None:
    truth = autograd_jacobians(torch_function(weights, biases, stages), x)
    torch.testing.assert_close(
        chain_jacobians(x, weights, biases, stages), truth, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", CASES)
def test_matches_autograd(name: str) -> None:
    shape, stages, weight_shapes = CASES[name]
    check_case(CASES[name])
    for bias in (True, False):
        weights, biases = draw(weight_shapes, torch.float64, bias=bias)
        assert_like_autograd(samples(4, shape, torch.float64), weights[0], biases[0], stages)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_match_autograd(activation: Activation) -> None:
    dims = (6, 9, 4)
    weights, biases = draw(mlp_shapes(dims), torch.float64)
    x = samples(5, (6,), torch.float64)
    for scale in (1.0, 30.0):
        assert_like_autograd(scale * x, weights[0], biases[0], mlp(dims, activation, activation))


KINKS = [-6.0, -1.0, -0.5, -0.0, 0.0, 0.4, 0.75, 1.0, 6.0, 700.0, -700.0]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_kinks_and_extremes_as_autograd_has_them(activation: Activation) -> None:
    x = torch.tensor(KINKS, dtype=torch.float64).unsqueeze(1)
    one = [torch.ones(1, 1, dtype=torch.float64)]
    assert_like_autograd(x, one, [None], [Linear(), activation])


def test_first_maximum_as_autograd_has_it() -> None:
    x = torch.randint(0, 3, (6, 2, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    weights, biases = draw([(3, 2 * 9)], torch.float64)
    assert_like_autograd(x, weights[0], biases[0], [max_pool(2), Flatten(), Linear()])
    weights, biases = draw([(3, 2 * 9)], torch.float64)
    assert_like_autograd(x, weights[0], biases[0], [max_pool(3, 2, 1), Flatten(), Linear()])


BAD: list[tuple[Stage, tuple[int, ...], tuple[int, ...] | None, str]] = [
    (Linear(), (2, 3), (4, 6), "put a Flatten"),
    (Linear(), (3,), (4, 2), r"expected a weight \(n_out, 3\)"),
    (Linear(), (3,), None, "weight"),
    (Linear(), (3,), (0, 3), "weight"),
    (ConvStage((1,), (0,), (1,)), (3,), (1, 3, 1), "takes samples"),
    (ConvStage((1,), (0,), (1,)), (3, 4, 4), (1, 3, 1, 1), "stride must be 2 numbers"),
    (ConvStage((0, 1), (0, 0), (1, 1)), (3, 4, 4), (1, 3, 1, 1), "stride must be 2 numbers >= 1"),
    (ConvStage((1, 1), (-1, 0), (1, 1)), (3, 4, 4), (1, 3, 1, 1), "padding must be"),
    (ConvStage((1, 1), (0, 0), (1, 1), 2), (3, 4, 4), (2, 1, 1, 1), "divide 3 channels"),
    (ConvStage((1, 1), (0, 0), (1, 1), 2), (4, 4, 4), (3, 2, 1, 1), "3 output channels"),
    (
        ConvStage((1, 1), (0, 0), (1, 1)),
        (3, 4, 4),
        (2, 2, 1, 1),
        r"expected a weight \(channels_out, 3, kernel",
    ),
    (ConvStage((1, 1), (0, 0), (1, 1)), (3, 4, 4), (2, 3, 5, 5), "leaves nothing"),
    (max_pool(5), (3, 4, 4), None, "leaves nothing"),
    (max_pool(2, 2, 2), (3, 4, 4), None, "more than half"),
    (AveragePool((2, 2), (1,), (0, 0)), (3, 4, 4), None, "stride must be 2"),
    (MaxPool((2, 2), (1, 1), (0, 0), (1,)), (3, 4, 4), None, "dilation must be 2"),
    (Activation("mish"), (3,), None, "unknown activation 'mish'"),
    (Activation("elu"), (3,), None, r"elu has the parameters \(alpha\)"),
    (Activation("relu", (1.0,)), (3,), None, "relu has the parameters"),
    (Activation("elu", (float("nan"),)), (3,), None, "finite"),
]


@pytest.mark.parametrize(("stage", "shape", "weight", "message"), BAD)
def test_stages_that_do_not_fit(
    stage: Stage, shape: tuple[int, ...], weight: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        output_shape(stage, shape, weight)


def test_output_shapes_are_torchs() -> None:
    for size in range(3, 9):
        x = torch.ones(1, 2, size)
        for kernel in (1, 2, 3):
            for stride in (1, 2, 3):
                for padding in range(kernel // 2 + 1):
                    for ceil_mode in (False, True):
                        pool = MaxPool((kernel,), (stride,), (padding,), (1,), ceil_mode)
                        truth = torch_function([], [], [pool])(x).numel() // 2
                        assert output_shape(pool, (2, size)) == (2, truth)

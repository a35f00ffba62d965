"""Chains that the tests of the op and of its reference share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lipfast.ops.chain_stages import (
    Activation,
    AveragePool,
    ConvStage,
    Flatten,
    Linear,
    MaxPool,
    Stage,
    is_affine,
    output_shape,
)

Weights = list[list[Tensor]]
Biases = list[list[Tensor | None]]
RELU = Activation("relu")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ACTIVATIONS = [
    RELU,
    Activation("leaky_relu", (0.2,)),
    Activation("leaky_relu", (-2.0,)),
    Activation("relu6"),
    Activation("hardtanh", (-0.5, 0.75)),
    Activation("tanh"),
    Activation("sigmoid"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("silu"),
    Activation("softplus", (1.0, 20.0)),
    Activation("softplus", (2.5, 1.0)),
    Activation("elu", (1.0,)),
    Activation("elu", (0.3,)),
]


def mlp(dims: Sequence[int], hidden: Activation, output: Activation | None = None) -> list[Stage]:
    stages: list[Stage] = []
    for _ in dims[1:-1]:
        stages += [Linear(), hidden]
    return [*stages, Linear(), *([output] if output is not None else [])]


def mlp_shapes(dims: Sequence[int]) -> list[tuple[int, ...]]:
    return [(after, before) for before, after in pairwise(dims)]


def draw(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    *,
    networks: int = 1,
    bias: bool = True,
    seed: int = 0,
) -> tuple[Weights, Biases]:
    """Gaussian weights of unit gain, Gaussian biases."""
    generator = torch.Generator().manual_seed(seed + sum(map(sum, shapes)))

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [
        [gaussian(*shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes]
        for _ in range(networks)
    ]
    biases: Biases = [
        [gaussian(shape[0]) if bias else None for shape in shapes] for _ in range(networks)
    ]
    return weights, biases


def samples(count: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)


def conv(stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> ConvStage:
    return ConvStage((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def max_pool(
    kernel: int, stride: int | None = None, padding: int = 0, ceil_mode: bool = False
) -> MaxPool:
    return MaxPool((kernel,) * 2, (stride or kernel,) * 2, (padding,) * 2, (1, 1), ceil_mode)


def average_pool(
    kernel: int,
    stride: int | None = None,
    padding: int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> AveragePool:
    return AveragePool(
        (kernel,) * 2, (stride or kernel,) * 2, (padding,) * 2, ceil_mode, count_include_pad
    )


# name -> (shape of a sample, stages, shapes of the weights)
Case = tuple[tuple[int, ...], list[Stage], list[tuple[int, ...]]]
CASES: dict[str, Case] = {
    "one convolution": ((2, 5, 6), [conv()], [(3, 2, 3, 2)]),
    "padded": ((3, 6, 7), [conv(padding=1), RELU, Flatten(), Linear()], [(5, 3, 3, 3), (4, 210)]),
    "padding wider than the kernel": (
        (1, 3, 3),
        [conv(padding=3), RELU, conv()],
        [(2, 1, 2, 2), (1, 2, 6, 6)],
    ),
    "stride 2": (
        (3, 9, 8),
        [conv(2, 1), RELU, conv(2), RELU, Flatten(), Linear()],
        [(17, 3, 3, 3), (6, 17, 2, 2), (3, 24)],
    ),
    "stride wider than the kernel": (
        (2, 9, 9),
        [conv(3), RELU, conv()],
        [(4, 2, 2, 2), (2, 4, 2, 2)],
    ),
    "dilation": (
        (2, 9, 9),
        [conv(dilation=2), RELU, conv(2, 2, 3), RELU, Flatten(), Linear()],
        [(5, 2, 3, 3), (4, 5, 3, 3), (3, 4 * 2 * 2)],
    ),
    "groups": (
        (6, 5, 5),
        [conv(padding=1, groups=3), RELU, conv(groups=2), RELU, Flatten(), Linear()],
        [(9 * 2, 2, 3, 3), (4, 9, 2, 2), (3, 64)],
    ),
    "depthwise": (
        (7, 6, 6),
        [conv(padding=1, groups=7), RELU, conv()],
        [(14, 1, 3, 3), (2, 14, 4, 4)],
    ),
    "uneven": (
        (2, 7, 5),
        [ConvStage((2, 1), (0, 2), (1, 2)), Activation("tanh"), Flatten(), Linear()],
        [(3, 2, 3, 2), (4, 3 * 3 * 7)],
    ),
    "max pool": (
        (3, 8, 8),
        [
            conv(padding=1),
            RELU,
            max_pool(2),
            conv(padding=1),
            RELU,
            max_pool(4),
            Flatten(),
            Linear(),
        ],
        [(8, 3, 3, 3), (20, 8, 3, 3), (5, 20)],
    ),
    "pool before the activation": (
        (2, 8, 8),
        [
            conv(padding=1),
            max_pool(2),
            Activation("silu"),
            conv(),
            max_pool(3),
            Flatten(),
            Linear(),
        ],
        [(8, 2, 3, 3), (4, 8, 2, 2), (3, 4)],
    ),
    "overlapping max pool": (
        (2, 9, 9),
        [
            conv(padding=1),
            RELU,
            max_pool(3, 2, 1),
            conv(),
            Activation("gelu"),
            max_pool(2, 1),
            Flatten(),
            Linear(),
        ],
        [(6, 2, 3, 3), (5, 6, 2, 2), (3, 45)],
    ),
    "pool after pool": (
        (2, 9, 9),
        [conv(), max_pool(3, 2), RELU, max_pool(2, 1), Activation("tanh"), Flatten(), Linear()],
        [(6, 2, 3, 3), (3, 24)],
    ),
    "dilated max pool, ceil mode": (
        (2, 8, 9),
        [conv(), MaxPool((2, 2), (2, 3), (1, 0), (2, 1), True), RELU, Flatten(), Linear()],
        [(3, 2, 2, 2), (4, 3 * 4 * 3)],
    ),
    "average pool": (
        (3, 8, 8),
        [
            conv(padding=1),
            RELU,
            average_pool(2),
            conv(),
            RELU,
            average_pool(3),
            Flatten(),
            Linear(),
        ],
        [(8, 3, 3, 3), (20, 8, 2, 2), (5, 20)],
    ),
    "overlapping average pool": (
        (2, 7, 7),
        [
            conv(padding=1),
            average_pool(3, 2, 1),
            RELU,
            average_pool(2, 1, 1, False, False),
            Flatten(),
            Linear(),
        ],
        [(4, 2, 3, 3), (3, 100)],
    ),
    "average pool, ceil mode": (
        (2, 8, 8),
        [
            average_pool(3, 2, 1, True),
            conv(),
            RELU,
            average_pool(3, 2, 0, True, False),
            Flatten(),
            Linear(),
        ],
        [(5, 2, 2, 2), (3, 5 * 4)],
    ),
    "pools of the input": (
        (3, 6, 6),
        [max_pool(2), Activation("tanh"), conv(), average_pool(2), RELU],
        [(4, 3, 2, 2)],
    ),
    "starts with an activation": ((5,), [Activation("tanh"), Linear(), RELU], [(7, 5)]),
    "activations in a row": (
        (5,),
        [Linear(), Activation("tanh"), Activation("leaky_relu", (-0.5,)), RELU, Linear()],
        [(30, 5), (4, 30)],
    ),
    "linear after linear": ((6,), [Linear(), Linear(), Flatten()], [(20, 6), (4, 20)]),
    "one axis": (
        (3, 20),
        [
            ConvStage((2,), (2,), (1,)),
            RELU,
            MaxPool((2,), (2,), (0,), (1,)),
            ConvStage((1,), (1,), (2,), 2),
            Activation("elu", (1.0,)),
            AveragePool((2,), (1,), (1,), True),
            Flatten(),
            Linear(),
        ],
        [(8, 3, 5), (6, 4, 2), (4, 36)],
    ),
    "output is an image": (
        (2, 5, 5),
        [conv(padding=1), RELU, conv(padding=1)],
        [(9, 2, 3, 3), (1, 9, 3, 3)],
    ),
    "more outputs than inputs": (
        (1, 3, 3),
        [conv(padding=1), RELU, conv(padding=1)],
        [(6, 1, 3, 3), (3, 6, 3, 3)],
    ),
    "channels beyond a panel": (
        (5, 4, 4),
        [conv(padding=1), RELU, conv(padding=1), RELU, max_pool(2), Flatten(), Linear()],
        [(37, 5, 3, 3), (35, 37, 3, 3), (12, 140)],
    ),
    "flat weights after an image": (
        (4, 3, 5),
        [RELU, Flatten(), Linear(), RELU, Linear()],
        [(33, 60), (11, 33)],
    ),
}


def check_case(case: Case) -> None:
    """The weights' shapes fit the stages."""
    shape, stages, weights = case
    remaining = iter(weights)
    for stage in stages:
        shape = output_shape(stage, shape, next(remaining) if is_affine(stage) else None)
    assert next(remaining, None) is None


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "softplus": functional.softplus,
    "elu": functional.elu,
}


def torch_function(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], stages: Sequence[Stage]
) -> Callable[[Tensor], Tensor]:
    """The chain as PyTorch's own functions, on a batch of samples: (B, K)."""

    def function(h: Tensor) -> Tensor:
        affine = zip(weights, biases, strict=True)
        for stage in stages:
            one_axis = h.dim() == 3
            if isinstance(stage, Linear):
                h = functional.linear(h, *next(affine))
            elif isinstance(stage, ConvStage):
                convolve = functional.conv1d if one_axis else functional.conv2d
                weight, bias = next(affine)
                h = convolve(
                    h, weight, bias, stage.stride, stage.padding, stage.dilation, stage.groups
                )
            elif isinstance(stage, MaxPool):
                pool = functional.max_pool1d if one_axis else functional.max_pool2d
                h = pool(
                    h,
                    stage.kernel_size,
                    stage.stride,
                    stage.padding,
                    stage.dilation,
                    stage.ceil_mode,
                )
            elif isinstance(stage, AveragePool):
                pool = functional.avg_pool1d if one_axis else functional.avg_pool2d
                h = pool(
                    h,
                    stage.kernel_size,
                    stage.stride,
                    stage.padding,
                    stage.ceil_mode,
                    stage.count_include_pad,
                )
            elif isinstance(stage, Flatten):
                h = h.flatten(1)
            else:
                assert isinstance(stage, Activation)
                h = _FUNCTIONS[stage.name](h, *stage.parameters)
        return h.flatten(1)

    return function


def autograd_jacobians(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, K, D), one backward pass per output."""
    x = x.detach().requires_grad_()
    y = function(x)
    rows = [
        torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0].flatten(1)
        for k in range(y.shape[1])
    ]
    return torch.stack(rows, 1)


def assert_close(got: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], largest: Tensor) -> None:
    for value, expected in zip(got, truth, strict=True):
        dtype = value.dtype
        torch.testing.assert_close(
            value.double(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=1e-8 * float(largest) * (dtype == torch.float32),
        )

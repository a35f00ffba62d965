"""Gradients written as products, against automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.losses import network_losses
from experiments.train import Network, StackedNetworks
from experiments.train.products import StackedGradients

MakeConfig = Callable[..., SweepConfig]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"bias": False, "output_activation": "relu"},
    {"depth": 3, "activation": "leaky_relu"},
    {"depth": 2, "loss": "mse", "target_scale": 3.0},
    {"bias": False, "loss": "mse", "output_activation": "leaky_relu"},
    {"activation": "none", "depth": 2},
]


def _networks(config: SweepConfig) -> list[Network]:
    return [Network(width, seed) for width in config.widths for seed in config.seeds]


def _expected(config: SweepConfig, stack: StackedNetworks, x: Tensor, y: Tensor) -> list[Tensor]:
    outputs = stack.forward(x, training=True)
    loss = network_losses(config.loss, outputs, y, config.target_scale).sum()
    return list(torch.autograd.grad(loss, list(stack.parameters.values())))


def _batches(stack: StackedNetworks, data: ClassificationData) -> list[tuple[Tensor, Tensor]]:
    """All samples for all networks alike; 10 and then 7 samples of each network's own."""
    x, y = stack.prepared(data.x_train), data.y_train
    generator = torch.Generator().manual_seed(3)
    own = [torch.randint(24, (len(stack.networks), n), generator=generator) for n in (10, 7)]
    return [(x, y), *((stack.taken(x, chosen), y[chosen]) for chosen in own)]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s)) or "default")
def test_products_are_the_gradients(
    make_config: MakeConfig, small_data: ClassificationData, settings: dict[str, Any]
) -> None:
    config = make_config(**settings)
    stack = StackedNetworks(config, _networks(config))
    gradients = StackedGradients(config, stack)
    # The first batch again at the end: memory that is used again holds nothing of another batch.
    batches = _batches(stack, small_data)
    for x, y in [*batches, batches[0]]:
        gradients.write(x, y)
        expected = _expected(config, stack, x, y)
        for parameter, gradient in zip(stack.parameters.values(), expected, strict=True):
            assert parameter.grad is not None
            assert gradient.any()
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s)) or "default")
def test_gradients_of_padding_are_exactly_zero(
    make_config: MakeConfig, small_data: ClassificationData, settings: dict[str, Any]
) -> None:
    config = make_config(**settings)
    stack = StackedNetworks(config, _networks(config))
    gradients = StackedGradients(config, stack)
    for x, y in _batches(stack, small_data):
        gradients.write(x, y)
        for name, parameter in stack.parameters.items():
            assert parameter.grad is not None
            padding = parameter.grad[(stack.masks[name] == 0).expand_as(parameter)]
            assert not padding.any()


def test_an_overflowing_network_leaves_the_others_alone(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config()
    stack = StackedNetworks(config, _networks(config))
    gradients = StackedGradients(config, stack)
    x, y = stack.prepared(small_data.x_train), small_data.y_train
    gradients.write(x, y)
    weight = stack.parameters["0.weight"]
    assert weight.grad is not None
    before = weight.grad.clone()
    with torch.no_grad():
        weight[2] = math.inf
    gradients.write(x, y)
    assert weight.grad[2].isnan().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(weight.grad[others], before[others])


@pytest.mark.parametrize(
    ("settings", "supported"),
    [
        ({}, True),
        ({"spectral_constraint": 1.0, "batch_size": 5, "weight_decay": 0.1}, True),
        ({"dropout": 0.1}, False),
        ({"lipschitz_penalty": 0.1}, False),
        ({"activation": "gelu"}, False),
        ({"output_activation": "softmax", "loss": "nll"}, False),
        ({"model": "cnn", "data": "digits"}, False),
    ],
    ids=str,
)
def test_what_is_left_to_automatic_differentiation(
    make_config: MakeConfig, settings: dict[str, Any], supported: bool
) -> None:
    assert StackedGradients.supports(make_config(**settings)) is supported

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.models import ACTIVATIONS, OUTPUT_ACTIVATIONS, fcn, resnet
from lipfast.errors import ArgumentError


def test_shapes_and_layers() -> None:
    model = fcn(7, depth=3, inputs=5, classes=4, bias=False, output_activation="relu")
    linears = [module for module in model if isinstance(module, nn.Linear)]
    assert [tuple(module.weight.shape) for module in linears] == [(7, 5), (7, 7), (7, 7), (4, 7)]
    assert all(module.bias is None for module in linears)
    assert isinstance(model[-1], nn.ReLU)
    assert model(torch.zeros(2, 5)).shape == (2, 4)


@pytest.mark.parametrize("name", OUTPUT_ACTIVATIONS)
def test_every_activation_can_be_built(name: str) -> None:
    hidden = name if name in ACTIVATIONS else "relu"
    model = fcn(3, activation=hidden, output_activation=name)
    assert len(model) == 4 - (hidden == "none") + (name != "none") - 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="activation is 'softmax'; allowed are none, relu"):
        fcn(3, activation="softmax")
    with pytest.raises(ArgumentError, match="depth is 0"):
        fcn(3, depth=0)


def test_the_convolutions_of_resnet50_start_with_the_variance_of_he() -> None:
    torch.manual_seed(0)
    kernels = [m.weight for m in resnet(8, 50).modules() if isinstance(m, nn.Conv2d)]
    assert len(kernels) == 53
    for kernel in kernels:
        fan_out = kernel.shape[0] * kernel[0, 0].numel()
        sampling = (2 / kernel.numel()) ** 0.5  # standard error of a variance, relative
        assert float(kernel.detach().var()) == pytest.approx(2 / fan_out, rel=5 * sampling)

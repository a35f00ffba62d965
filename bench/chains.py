"""Models of the Jacobian benches, as the fused op takes them, and the operations of a dense way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lipfast.ops.chain_stages import Activation, ConvStage, Flatten, Linear, MaxPool, Stage


def _stage(module: nn.Module) -> Stage:
    if isinstance(module, nn.Linear):
        return Linear()
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        return ConvStage(module.stride, module.padding, module.dilation, module.groups)
    if isinstance(module, nn.MaxPool2d):
        size = module.kernel_size
        assert isinstance(size, int)
        return MaxPool((size, size), (size, size), (0, 0), (1, 1))
    if isinstance(module, nn.ReLU):
        return Activation("relu")
    assert isinstance(module, nn.Flatten)
    return Flatten()


def chain_of(model: nn.Sequential) -> tuple[list[Tensor], list[Tensor | None], list[Stage]]:
    """Weights, biases and stages."""
    affine = [module for module in model if isinstance(module, nn.Linear | nn.Conv2d)]
    weights = [module.weight.detach() for module in affine]
    biases = [None if module.bias is None else module.bias.detach() for module in affine]
    return weights, biases, [_stage(module) for module in model]


def dense_operations(model: nn.Sequential, x: Tensor) -> float:
    """Floating-point operations per sample of a forward pass and K dense backward passes.

    The last linear layer's rows are where those start: its backward passes cost nothing.
    """
    h, operations, last = x[:1], 0.0, 0.0
    with torch.no_grad():
        for module in model:
            h = module(h)
            if isinstance(module, nn.Linear | nn.Conv2d):
                last = 2.0 * h[0].numel() * module.weight[0].numel()
                operations += last
    return operations + h.shape[1] * (operations - last)

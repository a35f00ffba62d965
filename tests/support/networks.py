"""Small networks with random weights and statistics, for several test files."""

from __future__ import annotations

import torch
from torch import nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode; every parameter and statistic random, variances around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.dtype.is_floating_point and value.dim() < 2:
                value.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


def convolutional(activation: nn.Module | None = None) -> nn.Sequential:
    """Convolutions with BatchNorm, both kinds of pools, groups and a stride."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        activation or nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6),
        activation or nn.ReLU(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(6, 4),
    )

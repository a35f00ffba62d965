"""Optimizers by name: what the key `optimizer` of a sweep may be.

Each is applied to stacked parameters of many networks, so that it must treat every entry by itself,
and must map a zero weight with a zero gradient to zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of parameters, the learning rate of the first update, momentum and weight decay.
Build = Callable[[list[Tensor], float, float, float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {}


def register_optimizer(name: str) -> Callable[[Build], Build]:
    """Decorate a function of parameters, lr, momentum and weight decay that makes an optimizer.

    Example:
        >>> @register_optimizer("rmsprop")
        ... def rmsprop(parameters, lr, momentum, weight_decay):
        ...     return torch.optim.RMSprop(parameters, lr, momentum=momentum)
        >>> _ = OPTIMIZERS.pop("rmsprop")
    """

    def register(build: Build) -> Build:
        OPTIMIZERS[name] = build
        return build

    return register


@register_optimizer("sgd")
def _sgd(
    parameters: list[Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=True)


@register_optimizer("adam")
def _adam(
    parameters: list[Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=True)


@register_optimizer("adamw")
def _adamw(
    parameters: list[Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)

"""Optimizers by name: what the key `optimizer` of a sweep may be.

Each is applied to stacked parameters of many networks, so that it must treat every entry by itself,
and must map a zero weight with a zero gradient to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from experiments.config import SweepConfig

Build = Callable[["SweepConfig", list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {}


def register_optimizer(name: str) -> Callable[[Build], Build]:
    """Decorate a function of the configuration and the parameters that makes an optimizer.

    Example:
        >>> @register_optimizer("rmsprop")
        ... def rmsprop(config, parameters):
        ...     return torch.optim.RMSprop(parameters, config.lr)
        >>> _ = OPTIMIZERS.pop("rmsprop")
    """

    def register(build: Build) -> Build:
        OPTIMIZERS[name] = build
        return build

    return register


@register_optimizer("sgd")
def _sgd(config: SweepConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


@register_optimizer("adam")
def _adam(config: SweepConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


@register_optimizer("adamw")
def _adamw(config: SweepConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)

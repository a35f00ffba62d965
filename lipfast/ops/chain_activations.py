"""The activations of a chain: all that Python knows of one of them is its entry in `ACTIVATIONS`.

`csrc/kernels/params.h` numbers them, `csrc/kernels/cpu/chain_activations-inl.h` evaluates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PiecewiseLinear:
    """What certified secants need of an activation.

    Attributes:
        kinks: where its linear pieces meet, given its parameters.
        steepest: largest magnitude of its slopes, given its parameters; None where all are 0 or 1,
            so that nothing is rounded.
        limit: of its magnitude, where the bound of an error uses it.
    """

    kinks: Callable[..., tuple[float, ...]]
    steepest: Callable[..., float] | None = None
    limit: float = math.inf


@dataclass(frozen=True)
class ChainActivation:
    """A pointwise function of a chain.

    Attributes:
        code: the kernels' number of it.
        evaluate: value and derivative at z, float64, given its parameters; autograd's at kinks.
        parameters: their names, at most two.
        pieces: what `chain_secants` needs; None: it does not take the activation.
    """

    code: int
    evaluate: Callable[..., tuple[Tensor, Tensor]]
    parameters: tuple[str, ...] = ()
    pieces: PiecewiseLinear | None = None


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.clamp(min=0), (z > 0).to(z.dtype)


def _leaky_relu(z: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    derivative = torch.full_like(z, slope).masked_fill(z > 0, 1.0)
    return z * derivative, derivative


def _hardtanh(z: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return z.clamp(low, high), ((z > low) & (z < high)).to(z.dtype)


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(z)
    return y, 1 - y * y


def _sigmoid(z: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(z)
    return y, y * torch.sigmoid(-z)


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    distribution = 0.5 * torch.erfc(-z / math.sqrt(2))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return z * distribution, distribution + z * density


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    half = torch.sigmoid(2 * inner)  # (1 + tanh(inner)) / 2
    return z * half, half + 2 * z * slope * half * torch.sigmoid(-2 * inner)


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.sigmoid(z)
    return z * y, y * (1 + z * torch.sigmoid(-z))


def _softplus(z: Tensor, beta: float, threshold: float) -> tuple[Tensor, Tensor]:
    linear = z * beta > threshold
    value = torch.where(linear, z, torch.log1p(torch.exp(z * beta)) / beta)
    return value, torch.where(linear, 1.0, torch.sigmoid(z * beta))


def _elu(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    negative = z.clamp(max=0)
    value = torch.where(z > 0, z, alpha * torch.expm1(negative))
    return value, torch.where(z > 0, 1.0, alpha * torch.exp(negative))


ACTIVATIONS = {
    "relu": ChainActivation(0, _relu, pieces=PiecewiseLinear(lambda: (0.0,))),
    "leaky_relu": ChainActivation(
        1,
        _leaky_relu,
        ("slope",),
        PiecewiseLinear(lambda slope: (0.0,), lambda slope: max(1.0, abs(slope))),
    ),
    "relu6": ChainActivation(
        2,
        lambda z: _hardtanh(z, 0.0, 6.0),
        pieces=PiecewiseLinear(lambda: (0.0, 6.0), limit=6.0),
    ),
    "hardtanh": ChainActivation(
        3, _hardtanh, ("min", "max"), PiecewiseLinear(lambda low, high: (low, high))
    ),
    "tanh": ChainActivation(4, _tanh),
    "sigmoid": ChainActivation(5, _sigmoid),
    "gelu": ChainActivation(6, _gelu),
    "gelu_tanh": ChainActivation(7, _gelu_tanh),
    "silu": ChainActivation(8, _silu),
    "softplus": ChainActivation(9, _softplus, ("beta", "threshold")),
    "elu": ChainActivation(10, _elu, ("alpha",)),
}
"""By ATen's names; ``gelu`` is the one with erf, ``gelu_tanh`` its approximation."""

"""Per-sample Jacobian norms of chains of affine maps, activations and pools: every Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
)
from lipfast.reference.jacobian_reduction import jacobian_reduction


def _clipped(z: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
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


def _leaky_relu(z: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    derivative = torch.full_like(z, slope).masked_fill(z > 0, 1.0)
    return z * derivative, derivative


_VALUE_AND_DERIVATIVE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "relu": lambda z: _leaky_relu(z, 0.0),
    "leaky_relu": _leaky_relu,
    "relu6": lambda z: _clipped(z, 0.0, 6.0),
    "hardtanh": _clipped,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "softplus": _softplus,
    "elu": _elu,
}


def _affine(stage: Stage, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(stage, Linear):
        return functional.linear(h, weight, bias)
    assert isinstance(stage, ConvStage)
    convolve = functional.conv1d if h.dim() == 3 else functional.conv2d
    return convolve(h, weight, bias, stage.stride, stage.padding, stage.dilation, stage.groups)


def _average(stage: AveragePool, h: Tensor) -> Tensor:
    pool = functional.avg_pool1d if h.dim() == 3 else functional.avg_pool2d
    return pool(
        h, stage.kernel_size, stage.stride, stage.padding, stage.ceil_mode, stage.count_include_pad
    )


def _maximum(stage: MaxPool, h: Tensor) -> tuple[Tensor, Tensor]:
    pool = functional.max_pool1d if h.dim() == 3 else functional.max_pool2d
    return pool(
        h,
        stage.kernel_size,
        stage.stride,
        stage.padding,
        stage.dilation,
        stage.ceil_mode,
        return_indices=True,
    )


def chain_jacobians(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], stages: Sequence[Stage]
) -> Tensor:
    r"""$J(x) = J_S \cdots J_1$ for every sample, one factor per stage: (B, K, D), float64.

    The D columns pass through the stages as a batch of their own, from the input on: through the
    linear part of an affine map or an average pool, times an activation's derivative, and at the
    positions where the maximum was found.
    """
    h = x.double()
    batch, columns = h.shape[0], h[0].numel()
    tangent = (
        torch.eye(columns, dtype=torch.float64).expand(batch, -1, -1).reshape(-1, *h.shape[1:])
    )
    affine = zip(weights, biases, strict=True)
    for stage in stages:
        if is_affine(stage):
            weight, bias = next(affine)
            h = _affine(stage, h, weight.double(), None if bias is None else bias.double())
            tangent = _affine(stage, tangent, weight.double(), None)
        elif isinstance(stage, AveragePool):
            h, tangent = _average(stage, h), _average(stage, tangent)
        elif isinstance(stage, MaxPool):
            h, index = _maximum(stage, h)
            source = tangent.reshape(batch, columns, h.shape[1], -1)
            index = index.flatten(2).unsqueeze(1).expand(-1, columns, -1, -1)
            tangent = source.gather(3, index).reshape(-1, *h.shape[1:])
        elif isinstance(stage, Flatten):
            h, tangent = h.flatten(1), tangent.flatten(1)
        elif isinstance(stage, Activation):
            h, derivative = _VALUE_AND_DERIVATIVE[stage.name](h, *stage.parameters)
            tangent = tangent * derivative.repeat_interleave(columns, 0)
    return tangent.reshape(batch, columns, -1).mT.contiguous()


def chain_jacobian_norms(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    """Spectral and Frobenius norms (N, B) of N networks' Jacobians at B samples, in float64.

    Example:
        >>> hidden = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        >>> chain_jacobian_norms(torch.ones(1, 2), [[hidden]], [[None]], [Linear()])[0]
        tensor([[5.]], dtype=torch.float64)
    """
    norms = [
        jacobian_reduction(chain_jacobians(x, network, network_biases, stages))
        for network, network_biases in zip(weights, biases, strict=True)
    ]
    return torch.stack([norm[0] for norm in norms]), torch.stack([norm[1] for norm in norms])

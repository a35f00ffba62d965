"""Per-sample Jacobian norms of chains of affine maps, activations and pools: every Jacobian."""

from __future__ import annotations

from collections.abc import Sequence

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
            h, derivative = stage.function.evaluate(h, *stage.parameters)
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

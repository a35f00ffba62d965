"""Secants of piecewise-linear chains in float64 torch: Jacobians, kinks, and running errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.ops.chain_activations import PiecewiseLinear
from lipfast.ops.chain_stages import Activation, Flatten, Linear, Stage
from lipfast.reference.chain_jacobian_norms import chain_jacobians

# Not those of `lipfast.rounding`: a mistake there must show here.
_U = 2.0**-53
_UNDERFLOW = 2.0**-1000


def _gamma(count: int) -> float:
    """``k u / (1 - k u)``, rounded up."""
    product = count * _U
    return math.nextafter(product / (1.0 - product) * (1.0 + 4 * _U), math.inf)


def jacobians(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
) -> Tensor:
    """(N, K, D): each network's Jacobian at its sample, x (N, D).

    Example:
        >>> jacobians(torch.ones(1, 1), [[torch.tensor([[2.0]])]], [[None]], [Linear()])
        tensor([[[2.]]], dtype=torch.float64)
    """
    found = [
        chain_jacobians(sample.unsqueeze(0), own, shifts, stages)[0]
        for sample, own, shifts in zip(x, weights, biases, strict=True)
    ]
    return torch.stack(found)


def kink_distances(
    x: Tensor,
    direction: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    """(N,) each: the smallest t > 0 at which ``x - t d``, or ``x + t d``, meets a kink; or inf.

    Example:
        >>> stages = [Linear(), Activation("relu")]
        >>> kink_distances(torch.ones(1, 1), torch.ones(1, 1), [[torch.eye(1)]], [[None]], stages)
        (tensor([1.], dtype=torch.float64), tensor([inf], dtype=torch.float64))
    """
    reach = [
        _reach(sample.double(), line.double(), own, shifts, stages)
        for sample, line, own, shifts in zip(x, direction, weights, biases, strict=True)
    ]
    backward, forward = zip(*reach, strict=True)
    return torch.stack(backward), torch.stack(forward)


def _reach(
    value: Tensor,
    slope: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    affine = zip(weights, biases, strict=True)
    backward = forward = torch.tensor(math.inf, dtype=torch.float64)
    for stage in stages:
        if isinstance(stage, Linear):
            weight, bias = next(affine)
            value = weight.double() @ value + (0.0 if bias is None else bias.double())
            slope = weight.double() @ slope
        elif isinstance(stage, Activation):
            for kink in _pieces(stage).kinks(*stage.parameters):
                # A unit that does not move has no kink ahead.
                distance = torch.where(slope != 0, (kink - value) / slope, math.inf)
                up = torch.where(distance > 0, distance, math.inf).amin()
                down = torch.where(distance < 0, -distance, math.inf).amin()
                forward, backward = torch.minimum(forward, up), torch.minimum(backward, down)
            value, derivative = stage.function.evaluate(value, *stage.parameters)
            slope = slope * derivative
    return backward, forward


def enclosures(
    points: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    """Values and error bounds (N, C, K) at points (N, C, D): running error analysis.

    Example:
        >>> values, errors = enclosures(
        ...     torch.ones(1, 1, 2), [[torch.tensor([[0.1, 0.2]])]], [[None]], [Linear()]
        ... )
        >>> bool((errors > 0).all() & (errors < 1e-15).all())
        True
    """
    found = [
        _enclosed(some.double(), own, shifts, stages)
        for some, own, shifts in zip(points, weights, biases, strict=True)
    ]
    values, errors = zip(*found, strict=True)
    return torch.stack(values), torch.stack(errors)


def _enclosed(
    value: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    affine = zip(weights, biases, strict=True)
    error = torch.zeros_like(value)
    for stage in stages:
        if isinstance(stage, Flatten):
            continue
        if isinstance(stage, Linear):
            weight, bias = next(affine)
            value, error = _enclosed_map(value, error, weight.double(), bias)
        else:
            assert isinstance(stage, Activation)
            value, error = _enclosed_activation(value, error, stage)
        # An overflow, perhaps of a partial sum only, is not a number near the truth.
        known = torch.isfinite(value) & ~torch.isnan(error)
        error = torch.where(known, error, math.inf)
    return value, error


def _enclosed_map(
    x: Tensor, error: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``gamma_{n+2} (|W| (|x| + e / gamma_{n+2}) + |b|)``, widened for its own roundings."""
    shift = torch.zeros(len(weight), dtype=x.dtype) if bias is None else bias.double()
    terms = weight.shape[1]
    relative = _gamma(terms + 2)
    bound = ((x.abs() + error / relative) @ weight.abs().mT + shift.abs()) * relative
    return x @ weight.mT + shift, bound * (1.0 + 2 * _gamma(terms + 8)) + _UNDERFLOW


def _enclosed_activation(value: Tensor, error: Tensor, stage: Activation) -> tuple[Tensor, Tensor]:
    result, _ = stage.function.evaluate(value, *stage.parameters)
    pieces = _pieces(stage)
    if pieces.steepest is None:
        return result, torch.minimum(error, (result.abs() + pieces.limit) * (1.0 + 8 * _U))
    steepest = pieces.steepest(*stage.parameters)
    total = error * steepest + (value.abs() + result.abs()) * (32 * _U)
    return result, total * (1.0 + 8 * _U) + _UNDERFLOW


def _pieces(stage: Activation) -> PiecewiseLinear:
    assert stage.function.pieces is not None
    return stage.function.pieces

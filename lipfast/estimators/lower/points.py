"""Where a secant is tried: along the direction that the Jacobian stretches most, at several steps.

No part of a proof: a secant is valid whatever its points are. Good ones make it tight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.estimators.jacobian.directions import steepest_direction
from lipfast.estimators.lower.networks import LARGEST_JACOBIAN, Networks, TracedNetworks
from lipfast.norms import Norm
from lipfast.ops.fetched import sent
from lipfast.ops.modes import forward_mode
from lipfast.plan.interpret import evaluate

# Relative to the size of the sample: long steps average out rounding errors, short ones
# curvature and kinks.
LADDER = tuple(10.0**-power for power in range(7))
# Steps to the nearest kinks and half way; a network without kinks is linear everywhere.
FRACTIONS = (0.99, 0.5)
LONGEST = 100.0
_POWER_ITERATIONS = 20
# Points on one line: the sample, and a step of each kind either way.
COUNT = 1 + 2 * (len(LADDER) + len(FRACTIONS))


def points_around(
    networks: Networks, x: Tensor, norm: Norm
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Points (networks, C, *shape) on a line through each sample, and which pairs are secants."""
    direction = _direction(networks, x, norm)
    offsets, pairs = _steps(networks, x, direction)
    shape = [*offsets.shape, *[1] * (x.dim() - 1)]
    return x.unsqueeze(1) + offsets.reshape(shape) * direction.unsqueeze(1), pairs


def _direction(networks: Networks, x: Tensor, norm: Norm) -> Tensor:
    """Where each Jacobian stretches most, (networks, *shape): from it whole, or by products."""
    if norm == 2 and isinstance(networks, TracedNetworks):
        rows, columns = networks.plan.jacobian_shape
        if rows * columns > LARGEST_JACOBIAN:
            return _power_direction(networks, x)
    return steepest_direction(networks.jacobians(x), norm).reshape(x.shape)


def _power_direction(networks: TracedNetworks, x: Tensor) -> Tensor:
    """Some power iterations with J^T J: for Jacobians that would not fit into memory.

    A direction that is not quite the steepest costs tightness only: a secant is valid along any.
    """
    plan = networks.plan

    def function(point: Tensor) -> Tensor:
        return evaluate(plan.graph, networks.parameters, plan.constants, [point.unsqueeze(1)])

    def unit(vector: Tensor, otherwise: Tensor) -> Tensor:
        length = vector.reshape(len(vector), -1).norm(dim=1).reshape(-1, *[1] * (vector.dim() - 1))
        return torch.where(torch.isfinite(length) & (length > 0), vector / length, otherwise)

    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu")
    start = sent(start, x.device)
    direction = unit(start, start)
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        outputs = function(point)
    if not outputs.requires_grad:  # a constant function stretches no direction
        return direction
    with forward_mode():
        for _ in range(_POWER_ITERATIONS):
            image = torch.func.jvp(function, (x,), (direction,))[1]
            (back,) = torch.autograd.grad(
                outputs, point, image, retain_graph=True, materialize_grads=True
            )
            direction = unit(back, direction)
    return direction


def _steps(
    networks: Networks, x: Tensor, direction: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Offsets (networks, C) along the direction, and which pairs of them make a secant."""
    size = x.reshape(len(x), -1).abs().amax(1)
    scale = torch.where(size > 0, size, torch.ones_like(size))
    backward, forward = networks.kink_distances(x, direction)
    forward = torch.minimum(forward, LONGEST * scale)
    backward = torch.minimum(backward, LONGEST * scale)
    columns = [torch.zeros_like(scale)]
    pairs: list[tuple[int, int]] = []
    steps = [(fraction * backward, fraction * forward) for fraction in FRACTIONS]
    steps += [(step * scale, step * scale) for step in LADDER]
    for down, up in steps:
        low, high = len(columns), len(columns) + 1
        columns += [-down, up]
        pairs += [(low, high), (0, high), (low, 0)]
    first, second = sent(torch.tensor(pairs, device="cpu"), x.device).unbind(1)
    return torch.stack(columns, 1), (first, second)

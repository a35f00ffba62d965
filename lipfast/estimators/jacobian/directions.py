"""Which input direction a Jacobian stretches most."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.norms import Norm
from lipfast.ops.spectral_norms import right_vectors


def steepest_direction(jacobians: Tensor, norm: Norm) -> Tensor:
    """Find the input direction (networks, D) that each Jacobian stretches most.

    Norm 2: top right singular vector; 1: unit vector of the largest column; inf: signs of the
    largest row. Where the Jacobian is 0 or not finite, some direction.
    """
    finite = torch.nan_to_num(jacobians, nan=0.0, posinf=0.0, neginf=0.0)
    networks, rows, columns = finite.shape
    if norm == 1:
        largest = finite.abs().sum(1).argmax(1)
        return torch.zeros_like(finite[:, 0]).scatter_(1, largest[:, None], 1.0)
    if math.isinf(norm):
        largest = finite.abs().sum(2).argmax(1)
        row = finite[torch.arange(networks, device=finite.device), largest]
        return torch.where(row < 0, -1.0, 1.0).to(finite.dtype)
    peak = finite.abs().amax((1, 2), keepdim=True)
    scaled = finite / torch.where(peak > 0, peak, torch.ones_like(peak))
    if scaled.is_cuda:  # torch waits for the device to see whether eigh has converged
        direction = right_vectors(scaled).to(scaled.dtype)
    elif rows <= columns:
        _, vectors = torch.linalg.eigh(scaled @ scaled.mT)
        direction = (scaled.mT @ vectors[:, :, -1:]).squeeze(-1)
    else:
        _, vectors = torch.linalg.eigh(scaled.mT @ scaled)
        direction = vectors[:, :, -1]
    length = direction.norm(dim=1, keepdim=True)
    axis = torch.zeros_like(direction)
    axis[:, 0] = 1.0
    return torch.where(length > 0, direction / length, axis)

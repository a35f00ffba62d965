"""The top of small matrices from their powers: a library's eigenvalues make the host wait."""

from __future__ import annotations

import torch
from torch import Tensor

# Squarings between two scalings: the largest eigenvalue is at least 1/k of the trace, and 16th
# powers do not underflow.
_BETWEEN_SCALINGS = 4


def top_of_small(matrices: Tensor, squarings: int = 12) -> tuple[Tensor, Tensor]:
    r"""Largest eigenvalues (P,) and unit eigenvectors (P, k), zero of zero; no proof.

    From the power $2^s$ of the matrices: values are too small by about $2^{-s}$ of themselves where
    others are so near, and exact but for rounding where none is. A rounding of a power $2^j$ is as
    one of $2^{-j}$ of its size in the matrix, so that all together are as a few of it.

    Args:
        matrices: (P, k, k), Hermitian and positive semidefinite but for rounding.
        squarings: s, a multiple of 4.

    Example:
        >>> values, vectors = top_of_small(torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None])
        >>> values, vectors
        (tensor([3.]), tensor([[0., 1., 0.]]))
    """
    matrices = 0.5 * (matrices + matrices.mH)
    power = matrices
    for _ in range(squarings // _BETWEEN_SCALINGS):
        trace = power.diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(1e-300)
        power = power / trace[:, None, None]
        for _ in range(_BETWEEN_SCALINGS):
            power = torch.bmm(power, power)
    largest = power.diagonal(dim1=1, dim2=2).real.argmax(1)
    place = largest[:, None, None].expand(-1, matrices.shape[1], 1)
    vectors = power.gather(2, place)
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    values = (vectors.conj() * torch.bmm(matrices, vectors)).sum((1, 2)).real
    return values, vectors[:, :, 0]

"""Per-sample Jacobian norms of a chain of affine maps, by forming every Jacobian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.reference.jacobian_reduction import jacobian_reduction


def chain_jacobians(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], slopes: Sequence[float]
) -> Tensor:
    r"""$J(x) = D_L W_L \cdots D_1 W_1$ for every sample: (B, K, D), float64.

    $D_l$ has 1 where $z_l > 0$ and the slope elsewhere, also at zero.
    """
    h = x.double()
    jacobian = torch.eye(h.shape[1], dtype=torch.float64).expand(h.shape[0], -1, -1)
    for weight, bias, slope in zip(weights, biases, slopes, strict=True):
        z = h @ weight.double().T
        if bias is not None:
            z = z + bias.double()
        derivative = torch.full_like(z, float(slope)).masked_fill(z > 0, 1.0)
        jacobian = derivative[:, :, None] * (weight.double() @ jacobian)
        h = z * derivative
    return jacobian


def chain_jacobian_norms(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    slopes: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Spectral and Frobenius norms (N, B) of N networks' Jacobians at B samples, in float64.

    Example:
        >>> hidden = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        >>> chain_jacobian_norms(torch.ones(1, 2), [[hidden]], [[None]], [0.0])[0]
        tensor([[5.]], dtype=torch.float64)
    """
    norms = [
        jacobian_reduction(chain_jacobians(x, network, network_biases, slopes))
        for network, network_biases in zip(weights, biases, strict=True)
    ]
    return torch.stack([norm[0] for norm in norms]), torch.stack([norm[1] for norm in norms])

"""Norms of given Jacobians, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, native_dtype


def jacobian_reduction(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    r"""Spectral and Frobenius norms $\|J_b\|_2$, $\|J_b\|_F$ of B Jacobians, without an SVD.

    The Gram matrix of the smaller of K and D is accumulated in float64 and reduced to its largest
    eigenvalue inside the kernel, several Jacobians in the lanes of a vector. When both exceed 64,
    Lanczos.

    Values of derivatives, not certified bounds; relative error about 1e-14 in float64 (5e-14 and
    5e-7 estimated, for float64 and float32, where Lanczos is used) plus one rounding to the dtype.

    Args:
        jacobian: (B, K, D), float16, bfloat16, float32 or float64. A Jacobian with NaN or Inf gives
            NaN.

    Returns:
        Two tensors (B,) of the Jacobian's dtype (float32 for the half types).

    Raises:
        ArgumentError: wrong type, dtype or shape.

    Example:
        >>> import torch
        >>> from lipfast.ops.jacobian_reduction import jacobian_reduction
        >>> spectral, frobenius = jacobian_reduction(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        >>> spectral, frobenius
        (tensor([4.]), tensor([5.]))
    """
    jacobian = check_floating(jacobian, "jacobian", 3)
    if jacobian.shape[1] == 0 or jacobian.shape[2] == 0:
        raise ArgumentError(f"jacobian: shape {tuple(jacobian.shape)} holds empty Jacobians")
    spectral, frobenius = torch.ops.lipfast.jacobian_reduction(native_dtype(jacobian))
    return spectral, frobenius


@torch.library.register_fake("lipfast::jacobian_reduction")
def _jacobian_reduction_fake(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    return jacobian.new_empty((jacobian.shape[0],)), jacobian.new_empty((jacobian.shape[0],))

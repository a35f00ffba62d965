"""Proved brackets of the norms 1 and inf of matrices: sums of magnitudes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError
from lipfast.norms import Norm
from lipfast.rounding import UNIT_ROUNDOFF


def sum_norms(
    matrices: Sequence[Tensor], names: Sequence[str], norm: Norm
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Largest column (1) or row (inf) sums of magnitudes, rounded outward, and where they are.

    Args:
        matrices: of any shapes; the bounds carry their gradients.
        names: what errors call them.
        norm: 1 or inf.

    Returns:
        Lower and upper bounds, and for each matrix the unit vector whose image is the largest and
        the image's direction, all in float64.

    Raises:
        NonFiniteError: a matrix holds NaN or Inf.
    """
    lower, upper, right, left = [], [], [], []
    for name, matrix in zip(names, matrices, strict=True):
        sums = matrix.double().abs().sum(dim=0 if norm == 1 else 1)
        top = int(sums.detach().argmax())
        value = sums[top]
        if not bool(torch.isfinite(value)) and not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"{name}: holds NaN or Inf; its norm is not defined")
        # Any order of summation of n non-negative terms: relative error at most gamma_{n-1}. A sum
        # that overflows is finite all the same: about the largest float64 at least.
        terms = matrix.numel() // sums.numel()
        slack = 1.0 + 2.0 * terms * UNIT_ROUNDOFF if terms > 1 else 1.0
        lower.append(value.clamp(max=sys.float_info.max) / slack)
        upper.append(value * slack)
        vector, image = _extremal(matrix.detach(), norm, top)
        right.append(vector)
        left.append(image)
    return torch.stack(lower), torch.stack(upper), right, left


def _extremal(matrix: Tensor, norm: Norm, top: int) -> tuple[Tensor, Tensor]:
    """The unit vector whose image is the largest, and the image's direction."""
    if norm == 1:
        vector = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
        vector[top] = 1.0
    else:
        vector = torch.where(matrix[top] < 0, -1.0, 1.0).double() / math.sqrt(matrix.shape[1])
    image = matrix.double() @ vector
    size = float(image.norm())
    return vector, image / size if 0 < size < math.inf else image

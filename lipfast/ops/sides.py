"""Which side of a matrix is the smaller one: Gram matrices are formed of that."""

from __future__ import annotations

from torch import Tensor


def is_wide(rows: int, columns: int) -> bool:
    """Whether the rows are the smaller side; of a square matrix they are."""
    return rows <= columns


def wide(matrix: Tensor) -> Tensor:
    """(..., s, l) with s <= l: the matrix, or its transpose.

    Example:
        >>> import torch
        >>> wide(torch.ones(3, 2)).shape
        torch.Size([2, 3])
    """
    return matrix if is_wide(*matrix.shape[-2:]) else matrix.mT

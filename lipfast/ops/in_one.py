"""Tensors of one shape as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_one(tensors: Sequence[Tensor]) -> Tensor:
    """(n, *shape): a view where they lie at equal distances in one storage, or else a copy.

    Args:
        tensors: at least one, of one shape, dtype and device, without gradients.

    Example:
        >>> import torch
        >>> rows = torch.arange(6.0).reshape(3, 2).unbind()
        >>> in_one(rows[::2]), in_one(rows)._base is not None
        (tensor([[0., 1.],
                [4., 5.]]), True)
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    begin, size = first.data_ptr(), first.itemsize
    step = tensors[1].data_ptr() - begin
    storage = first.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    strides = first.stride()
    if (
        begin
        and step >= 0
        and step % size == 0
        and begin + (len(tensors) - 1) * step + size * _memory_span(first) <= end
        and all(tensor.data_ptr() == begin + i * step for i, tensor in enumerate(tensors))
        and all(tensor.stride() == strides for tensor in tensors)
    ):
        shape = (len(tensors), *first.shape)
        return first.as_strided(shape, (step // size, *strides), first.storage_offset())
    return torch.stack(list(tensors))


def _memory_span(tensor: Tensor) -> int:
    """Entries from the first to the last one in memory."""
    if not tensor.numel():
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)

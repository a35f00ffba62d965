"""Tensors of many networks as one: rows are converted and checked together then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensor (N, *shape) whose rows these are, in their order; None where they are not.

    Example:
        >>> import torch
        >>> whole = torch.arange(6.0).reshape(3, 2)
        >>> rows_of_one(whole.unbind())
        tensor([[0., 1.],
                [2., 3.],
                [4., 5.]])
        >>> rows_of_one([torch.ones(2), torch.ones(2)]) is None
        True
    """
    first, storage = tensors[0], tensors[0].untyped_storage().data_ptr()
    step = tensors[1].storage_offset() - first.storage_offset() if len(tensors) > 1 else 0
    like = (first.dtype, first.device, first.shape, first.stride(), first.is_neg())
    for index, tensor in enumerate(tensors):
        if (
            (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg()) != like
            or tensor.storage_offset() != first.storage_offset() + index * step
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return None
    if step < 0:
        return None
    return first.detach().as_strided((len(tensors), *first.shape), (step, *first.stride()))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors without gradients, (N, *shape), CUDA's in a launch per 1,000.

    Rows of one tensor are not copied, and transposed matrices stay so. Where dtypes differ the
    result is float64.

    Args:
        tensors: of one shape and device.

    Example:
        >>> import torch
        >>> stacked([torch.ones(2), torch.zeros(2)])
        tensor([[1., 1.],
                [0., 0.]])
    """
    whole = rows_of_one(tensors)
    if whole is not None:
        return whole
    if len({tensor.dtype for tensor in tensors}) > 1:  # integers would be rounded to float32
        tensors = [tensor.double() for tensor in tensors]
    if all(tensor.dim() == 2 and tensor.mT.is_contiguous() for tensor in tensors):
        return _copied([tensor.mT for tensor in tensors]).mT
    return _copied(tensors)


def _copied(tensors: Sequence[Tensor]) -> Tensor:
    result: Tensor = torch.ops.lipfast.stack([tensor.detach().contiguous() for tensor in tensors])
    return result


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The tensors in a dtype, contiguous; rows of one are converted together.

    Example:
        >>> import torch
        >>> halves = torch.ones(2, 3, dtype=torch.float16).unbind()
        >>> [row.dtype for row in converted(halves, torch.float32)]
        [torch.float32, torch.float32]
    """
    if all(tensor.dtype is dtype and tensor.is_contiguous() for tensor in tensors):
        return tensors
    whole = rows_of_one(tensors)
    if whole is not None:
        return whole.to(dtype).contiguous().unbind()
    return [tensor.detach().to(dtype).contiguous() for tensor in tensors]


@torch.library.register_fake("lipfast::stack")
def _stack_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((len(tensors), *tensors[0].shape))


@torch.library.impl("lipfast::stack", "CPU")
def _stack_cpu(tensors: list[Tensor]) -> Tensor:
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):  # torch's own would convert
        raise RuntimeError("stack: expected tensors of one type")
    return torch.stack(tensors)

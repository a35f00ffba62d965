"""Checks that several ops make of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast import _native
from lipfast.errors import ArgumentError

Norm = int | float
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_norm(norm: Norm) -> Norm:
    """Returns 1, 2 or `math.inf`; anything else is an error."""
    if norm in (1, 2):
        return int(norm)
    if norm == math.inf:
        return math.inf
    raise ArgumentError(f"norm must be 1, 2 or float('inf'), got {norm!r}")


def check_floating(tensor: object, name: str, dimensions: int | None = None) -> Tensor:
    """Returns a dense real floating-point tensor on a device with kernels, or raises an error."""
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{name}: is {tensor.layout}; pass a dense tensor (tensor.to_dense())")
    if tensor.dtype not in FLOATING:
        raise ArgumentError(
            f"{name}: has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64 "
            "(tensor.float())"
        )
    if tensor.is_meta:
        raise ArgumentError(f"{name}: is a meta tensor and holds no data")
    if tensor.device.type not in _native.devices():
        reason = _native.cuda_reason() if tensor.device.type == "cuda" else None
        raise ArgumentError(
            f"{name}: is on {tensor.device}; this build has kernels for "
            f"{' and '.join(_native.devices())} only (tensor.cpu())"
            + (f": {reason}" if reason else "")
        )
    if dimensions is not None and tensor.dim() != dimensions:
        raise ArgumentError(
            f"{name}: expected {dimensions} dimensions, got shape {tuple(tensor.shape)}"
        )
    return tensor


def check_same_device(tensor: Tensor, like: Tensor, name: str) -> None:
    """Raises an error that names a tensor on another device than the others of its call."""
    if tensor.device != like.device:
        raise ArgumentError(
            f"{name}: is on {tensor.device}, expected {like.device}: all tensors of a call must be "
            f"on one device (tensor.to({str(like.device)!r}))"
        )


def native_dtype(tensor: Tensor) -> Tensor:
    """The same values, detached and contiguous; float32 for the half types (exact)."""
    tensor = tensor.detach()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()

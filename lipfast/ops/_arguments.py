"""Checks that several ops make of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lipfast import _native
from lipfast.errors import ArgumentError

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    check_device(tensor.device, f"{name}: is")
    if dimensions is not None and tensor.dim() != dimensions:
        raise ArgumentError(
            f"{name}: expected {dimensions} dimensions, got shape {tuple(tensor.shape)}"
        )
    return tensor


def check_device(device: torch.device, what: str) -> None:
    """Raises an error that begins with `what` where there are no kernels for a device."""
    if device.type not in _native.devices():
        reason = _native.cuda_reason() if device.type == "cuda" else None
        raise ArgumentError(
            f"{what} on {device}; this build has kernels for "
            f"{' and '.join(_native.devices())} only (tensor.cpu())"
            + (f": {reason}" if reason else "")
        )


def check_terms(count: int, name: str) -> None:
    """Raise an error for sums of so many numbers that the room for their roundings does not do."""
    if count >= 2**30:
        raise ArgumentError(
            f"{name}: sums of {count} numbers; roundings are bounded for fewer than 2^30"
        )


def check_rtol(rtol: object) -> None:
    """Raise an error unless 0 < rtol < 1."""
    if not isinstance(rtol, Real) or not 0 < rtol < 1:  # type: ignore[operator]
        raise ArgumentError(f"rtol must be a number between 0 and 1, got {rtol!r}")


def check_integer(name: str, value: object, least: int, bits: int = 64) -> None:
    """Raise an error unless a value is an integer that kernels can count with."""
    in_range = isinstance(value, Integral) and least <= int(value) < 2 ** (bits - 1)
    if isinstance(value, bool) or not in_range:
        raise ArgumentError(
            f"{name} must be a {bits}-bit integer of at least {least}, got {value!r}"
        )


def named_entries(
    values: object, plural: str, left_out: Callable[[Any, Any], bool], least: int
) -> tuple[list[Any], list[Any]]:
    """Keys and entries of a list or a mapping of tensors; of one tensor, itself.

    Args:
        values: what the caller gave. A list's keys are its positions.
        plural: what the entries are called, such as "matrices".
        left_out: whether the entry of a mapping, by key and value, is none of them.
        least: the dimensions that an entry has at least.

    Raises:
        ArgumentError: another type, or nothing is left.
    """
    if isinstance(values, Tensor):
        return [0], [values]
    if isinstance(values, Mapping):
        keys = [key for key, value in values.items() if not left_out(key, value)]
        if values and not keys:
            raise ArgumentError(
                f"no {plural} among the {len(values)} entries of the mapping: all have fewer than "
                f"{least} dimensions"
            )
        entries = [values[key] for key in keys]
    elif isinstance(values, Sequence) and not isinstance(values, str):
        keys, entries = list(range(len(values))), list(values)
    else:
        hint = "; give module.state_dict()" if isinstance(values, torch.nn.Module) else ""
        raise ArgumentError(
            f"expected a list or a dict of {plural}, got {type(values).__name__}{hint}"
        )
    if not entries:
        raise ArgumentError(f"no {plural} were given")
    return keys, entries


def check_same_device(tensor: Tensor, like: Tensor, name: str) -> None:
    """Raises an error that names a tensor on another device than the others of its call."""
    if tensor.device != like.device:
        raise ArgumentError(
            f"{name}: is on {tensor.device}, expected {like.device}: all tensors of a call must be "
            f"on one device (tensor.to({str(like.device)!r}))"
        )


def native_dtype(tensor: Tensor) -> Tensor:
    """Contiguous values of a type that kernels read; float32 for the half types, which is exact.

    Stays in the graph of autograd, which casts the gradient back.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()

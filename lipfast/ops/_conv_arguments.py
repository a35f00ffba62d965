"""What `conv_norms` is given: kernels, options for each, and what an earlier call found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.ops._arguments import (
    FLOATING,
    check_floating,
    check_same_device,
    named_entries,
    native_dtype,
)
from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._conv_search import HEADER, ConvStart
from lipfast.ops._keyed import entry_name


def read_kernels(kernels: object) -> tuple[list[Any], list[Tensor]]:
    """Keys and contiguous float32 or float64 kernels; of a state dict, those of convolutions."""
    keys, values = named_entries(kernels, "kernels", _is_no_kernel, 3)
    weights = []
    for key, value in zip(keys, values, strict=True):
        name = entry_name("kernel", key)
        weight = check_floating(value, name)
        check_same_device(weight, values[0], name)
        if not 3 <= weight.dim() <= 5:
            raise ArgumentError(
                f"{name}: expected (out, in / groups, *kernel size) with one to three axes, "
                f"got shape {tuple(weight.shape)}"
            )
        if weight.numel() == 0:
            raise ArgumentError(f"{name}: is empty, shape {tuple(weight.shape)}")
        weights.append(native_dtype(weight.detach()))
    _check_finite(keys, weights)
    return keys, weights


def _check_finite(keys: list[Any], weights: list[Tensor]) -> None:
    """One wait for the device for all kernels."""
    finite = torch.stack([torch.isfinite(weight).all() for weight in weights]).tolist()
    for key, good in zip(keys, finite, strict=True):
        if not good:
            name = entry_name("kernel", key)
            raise NonFiniteError(f"{name}: holds NaN or Inf; its norm is not defined")


def _is_no_kernel(_: object, value: object) -> bool:
    return isinstance(value, Tensor) and (value.dim() < 3 or value.dtype not in FLOATING)


def spread(value: object, name: str, kernels: object, keys: list[Any]) -> list[Any]:
    """One value of an option per kernel."""
    if isinstance(value, Mapping):
        if not isinstance(kernels, Mapping):
            raise ArgumentError(f"{name}: is a mapping, the kernels are not; give a list")
        missing = [key for key in keys if key not in value]
        if missing:
            raise ArgumentError(f"{name}: has no entry for {entry_name('kernel', missing[0])}")
        return [value[key] for key in keys]
    if isinstance(value, list):
        if len(value) != len(keys):
            raise ArgumentError(
                f"{name}: a list holds one value per kernel: expected {len(keys)}, got "
                f"{len(value)} (a tuple holds one per axis)"
            )
        return value
    return [value] * len(keys)


def read_starts(
    start: object, kernels: object, keys: list[Any], convs: list[ConvOperator]
) -> list[ConvStart | None]:
    """What is known of each kernel; None where it was not part of the earlier call."""
    if start is None:
        return [None] * len(keys)
    if not isinstance(start, list | Mapping):
        raise ArgumentError(
            f"start: expected the ConvNorms of an earlier call, got {type(start).__name__}"
        )
    if isinstance(start, Mapping) != isinstance(kernels, Mapping):
        raise ArgumentError("start: keyed otherwise than the kernels (a list and a mapping)")
    if not isinstance(start, Mapping) and len(start) != len(keys):
        raise ArgumentError(f"start: holds {len(start)} kernels, {len(keys)} were given")
    found = [start.get(key) for key in keys] if isinstance(start, Mapping) else start
    for key, conv, known in zip(keys, convs, found, strict=True):
        if known is not None:
            _check_start(known, conv, entry_name("kernel", key))
    return found


def _check_start(known: object, conv: ConvOperator, name: str) -> None:
    if not isinstance(known, ConvStart):
        raise ArgumentError(f"start: expected a ConvStart for {name}, got {type(known).__name__}")
    out, inputs = conv.channels
    shape = (out, *conv.output_size) if conv.transposed else (inputs, *conv.input_size)
    rows = conv.taps_shape()[-2]
    if tuple(known.right.shape) != shape or known.maximum.numel() != HEADER + 2 * rows:
        raise ArgumentError(
            f"start: {name} had another shape: its right vector is {tuple(known.right.shape)}, "
            f"expected {shape}"
        )
    check_same_device(known.right, conv.weight, f"start: {name}")

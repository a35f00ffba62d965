"""Evaluate a user's module, with its own error in the caller's words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, TraceError
from lipfast.plan.kept import Kept
from lipfast.plan.modules import evaluation_mode
from lipfast.plan.untraceable import head_line, where


def evaluate_module(
    module: nn.Module, inputs: Sequence[Tensor], *, gradients: bool = False
) -> object:
    """What a module in `evaluation_mode` returns.

    Args:
        module: may write to its inputs, which are copied.
        inputs: samples of each input.
        gradients: evaluate with gradients first; else with them only where it fails without.

    Raises:
        TraceError: it cannot be evaluated on the inputs; its own error says more.
        ArgumentError: the inputs are on another device.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return _returned(module, inputs, gradients)
            except RuntimeError:  # a derivative inside forward may need autograd
                return _returned(module, inputs, not gradients)
    except MemoryError:
        raise
    except Exception as error:  # user code runs here: anything may come out
        require_device_of(module, inputs)
        shapes = ", ".join(str(tuple(value.shape[1:])) for value in inputs)
        raise TraceError(
            f"{type(module).__name__} cannot be evaluated on samples of shape {shapes}"
            f"{where(error)}: {head_line(error)}. Check the data: its first dimension is the "
            "sample, the others are what the model takes."
        ) from error


def require_device_of(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Check that samples are on a device of the module's, which may have parts on several.

    Raises:
        ArgumentError: they are on another.
    """
    devices = dict.fromkeys(value.device for value in (*module.parameters(), *module.buffers()))
    for value in inputs:
        if devices and value.device not in devices:
            there = next(iter(devices))
            raise ArgumentError(
                f"the samples are on {value.device} and the model on {there}: move the samples "
                f"(x.to({str(there)!r})) or the model"
            )


def require_evaluates(module: nn.Module, inputs: Sequence[Tensor]) -> object:
    """What a module returns; where it cannot be traced, its own error says more.

    Raises:
        TraceError: it cannot be evaluated on the inputs, or writes to its tensors.
    """
    with evaluation_mode(module) as kept:
        outputs = evaluate_module(module, inputs)
        require_nothing_written(type(module).__name__, kept)
    return outputs


def require_nothing_written(name: str, kept: Kept) -> None:
    """Check that a module, evaluated since `kept` was made, wrote to none of its tensors.

    Raises:
        TraceError: it did; says which.
    """
    written = kept.rewritten()
    if written:
        raise TraceError(
            f"{name} writes its {', '.join(written)} in forward, even in eval mode: then its "
            "outputs are no function of parameters and inputs that can be traced. Evaluate the "
            "model once, if this initialises it, or write in training mode only (if self.training)"
        )


def _returned(module: nn.Module, inputs: Sequence[Tensor], gradients: bool) -> object:
    with torch.set_grad_enabled(gradients):
        # Forward may write to its inputs, which it may not to leaves of autograd.
        return module(*(value.detach().requires_grad_(gradients).clone() for value in inputs))

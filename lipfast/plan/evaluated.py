"""Evaluate a user's module, with its own error in the caller's words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipfast.errors import TraceError
from lipfast.plan.untraceable import head_line, where


def evaluated(module: nn.Module, inputs: Sequence[Tensor], *, gradients: bool = False) -> object:
    """What a module in `evaluation_mode` returns.

    Args:
        module: may write to its inputs, which are copied.
        inputs: samples of each input.
        gradients: evaluate with gradients first; else with them only where it fails without.

    Raises:
        TraceError: it cannot be evaluated on the inputs; its own error says more.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.set_grad_enabled(gradients):
                    return module(*(value.clone() for value in inputs))
            except RuntimeError:  # a derivative inside forward may need autograd
                with torch.set_grad_enabled(not gradients):
                    return module(*(value.clone().requires_grad_(not gradients) for value in inputs))
    except MemoryError:
        raise
    except Exception as error:  # user code runs here: anything may come out
        shapes = ", ".join(str(tuple(value.shape[1:])) for value in inputs)
        raise TraceError(
            f"{type(module).__name__} cannot be evaluated on samples of shape {shapes}"
            f"{where(error)}: {head_line(error)}. Check the data: its first dimension is the "
            "sample, the others are what the model takes."
        ) from error

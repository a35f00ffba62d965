"""What is checked of a function that is no module before autograd's gradients count as its own.

It may hold something for each sample, labels for instance. So it is given all samples or none, and
what others do to one is seen by moving every second.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.derivatives import MIDDLE, Probe, probe, random_directions
from lipfast.estimators.jacobian.function import Function
from lipfast.estimators.jacobian.precision import values_of


def require_gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, values: Tensor, gradient: Tensor
) -> None:
    """Check a gradient by a difference quotient: three evaluations of all samples if all is well.

    To be used inside `function.differentiating`; torch's generators are left as they are.

    Args:
        function: (B, D...) -> (B,) or (B, 1).
        x: the samples.
        values: of the function there.
        gradient: autograd's, of the sum of the values: (B, D...).

    Raises:
        ArgumentError: a value depends on other samples or is random, or the gradient is not that of
            the function.
    """

    def flat(samples: Tensor) -> Tensor:
        return function(samples.clone()).reshape(len(x), 1)  # it may write into its argument

    here = values.detach().reshape(len(x), 1)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        _require_apart(flat, x.detach(), here)
        try:
            wrong = _disagreement(flat, x.detach(), here, gradient.detach())
        except MemoryError:
            raise
        except Exception:  # user code, on points that nobody gave: nothing follows from an error
            return
    if wrong is not None:
        raise ArgumentError(
            "autograd's gradient is not that of the function: along a random direction it is "
            f"{wrong[0]:.4g} where difference quotients are {wrong[1]:.4g}. Something in the "
            "function is under torch.no_grad, detached (.detach(), .data, .item(), numpy), a "
            "straight-through estimator or gradient reversal, or changed by a hook: give the "
            "function without it."
        )


def _disagreement(
    function: Function, x: Tensor, here: Tensor, gradient: Tensor
) -> tuple[float, float] | None:
    directions = random_directions(x, torch.Generator(device="cpu").manual_seed(0))
    derivative = (gradient * directions).reshape(len(gradient), -1).double().sum(1)
    eps = torch.finfo(x.dtype).eps
    line = Probe(function, x, directions, torch.ones_like(here), eps, derivative, here)
    if line.agrees(line.quotients(MIDDLE)):
        return None
    # The samples may lie on kinks: at points near them, in float64 if the function takes it.
    with contextlib.suppress(Exception):
        return probe(function, x.double()).disagreement()
    return probe(function, x).disagreement()


def _require_apart(function: Function, x: Tensor, here: Tensor) -> None:
    """Move every second sample, far away if the function is defined there."""
    for others in (-4 * x, x.roll(1, 0)):
        moved = x.clone()
        moved[1::2] = others[1::2]
        try:
            there = values_of(function, moved)
        except MemoryError:
            raise
        except Exception:  # user code, on a point that nobody gave: nothing follows from an error
            continue
        if _nearly_equal(there[::2], here[::2]):
            return
        if not _nearly_equal(values_of(function, x), here):
            raise ArgumentError(
                "the function gives other values for the same samples when it is evaluated again: "
                "is it random (dropout, a model in training mode)?"
            )
        raise ArgumentError(
            "the function mixes the samples: the value of one changes with the others. Its b-th "
            "value must depend on sample b only (reduction='none', a model in eval mode, BatchNorm "
            "with running statistics)."
        )


def _nearly_equal(values: Tensor, others: Tensor) -> bool:
    # The batches are of one size, so that nearly all functions give the same bits.
    return torch.allclose(values, others, math.sqrt(torch.finfo(values.dtype).eps), 0, True)

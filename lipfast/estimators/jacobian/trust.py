"""What is checked of a model before autograd's derivatives are taken for its Jacobians.

Where a plan answers, nothing of this is needed: tracing has checked that samples stay apart, and
its graph is the function, whatever the model does to gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.apart import require_apart
from lipfast.estimators.jacobian.derivatives import derivative_fault
from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.precision import other_precision


def require_autograd(
    problem: SampleFunction, module: nn.Module, inputs: Sequence[Tensor], *, traced: bool = False
) -> None:
    """Check that a model has a Jacobian per sample, and that autograd gives it.

    Evaluates up to four of the samples, whatever their number; more only if something is wrong.

    Args:
        problem: the model as a function of all samples.
        module: the model itself.
        inputs: of the module, as they were given.
        traced: there is a plan, so the samples are known to stay apart.

    Raises:
        ArgumentError: the model mixes the samples of a batch, is random, or jumps; or autograd's
            derivatives are not its own.
    """
    with differentiating(), other_precision(module, inputs, problem) as other:
        if not traced:
            require_apart(problem, type(module).__name__, other)
        ends = replace(problem, x=problem.x.detach()[[0, -1]])
        if ends.x.dtype != torch.float64 and (wide := other()) is not None:
            ends = replace(wide, x=ends.x.double())
        fault = derivative_fault(ends, module)
    if fault is not None:
        raise ArgumentError(
            f"{fault}. Give the model without it. Where lipfast.compile can trace the model, "
            "lower_bound (per_sample=True for the norm at every sample) differentiates its graph, "
            "which is the function."
        )

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
        few = replace(problem, x=_few(problem.x.detach()))
        if few.x.dtype != torch.float64 and (wide := other()) is not None:
            few = replace(wide, x=few.x.double())
        fault = derivative_fault(few, module)
    if fault is not None:
        raise ArgumentError(
            f"{fault}. Give the model without it. Where lipfast.compile can trace the model, "
            "lower_bound (per_sample=True for the norm at every sample) differentiates its graph, "
            "which is the function."
        )


def _few(x: Tensor) -> Tensor:
    """The first and the last sample, one with the largest entry, and one in the middle.

    A branch that few samples take, those with a large entry often take.
    """
    if len(x) <= 2:
        return x[[0, -1]]
    largest = int(x.reshape(len(x), -1).abs().amax(1).argmax())
    generator = torch.Generator(device="cpu").manual_seed(len(x))
    middle = 1 + int(torch.randint(len(x) - 2, (), generator=generator, device="cpu"))
    return x[[0, -1, *sorted({largest, middle} - {0, len(x) - 1})]]

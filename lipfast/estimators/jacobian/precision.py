"""In which precision a model computes, and the model once more in the other one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lipfast.estimators.jacobian.function import Function, SampleFunction, model_function
from lipfast.plan.gaps import LARGEST_COPY

Other = Callable[[], SampleFunction | None]


def values_of(function: Function, x: Tensor) -> Tensor:
    """Values of a function that is evaluated as it will be differentiated.

    To be used inside `differentiating`.
    """
    return function(x.detach().clone().requires_grad_()).detach()


@contextlib.contextmanager
def other_precision(
    module: nn.Module, inputs: Sequence[Tensor], problem: SampleFunction
) -> Iterator[Other]:
    """A call that gives the model in float64, or in float32 if `problem` is in float64.

    It gives None where the model is large, or cannot be evaluated in that dtype.
    """
    found: list[SampleFunction | None] = []
    with contextlib.ExitStack() as stack:

        def other() -> SampleFunction | None:
            if not found:
                wide = problem.x.dtype == torch.float64
                dtype = torch.float32 if wide else torch.float64
                first = [value.detach()[:2] for value in inputs]
                found.append(None)
                if sum(value.numel() for value in problem.constants) <= LARGEST_COPY:
                    with contextlib.suppress(Exception):  # user code runs: it may insist on a dtype
                        again = model_function(module, first, dtype=dtype)
                        found[0] = stack.enter_context(again)
            return found[0]

        yield other

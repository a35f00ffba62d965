"""In which precision a model computes, and the model once more in the other one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lipfast.estimators.jacobian.function import Function, SampleFunction, model_function

# Parameters that are copied to another precision: a check should not take more than its model.
_LARGEST_COPY = 1 << 26
_MASK = 1e8
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
                if sum(value.numel() for value in problem.constants) <= _LARGEST_COPY:
                    with contextlib.suppress(Exception):  # user code runs: it may insist on a dtype
                        again = model_function(module, first, dtype=dtype)
                        found[0] = stack.enter_context(again)
            return found[0]

        yield other


class Roundings(TorchFunctionMode):
    """Notes what decides how large the rounding errors of a function are.

    (A mode below autograd would see more, and would import a second's worth of torch's compiler.)

    Attributes:
        eps: the distance from 1 to the next number of the shortest dtype that the function converts
            numbers to, or computes with.
        largest: the largest magnitude of any result, if it was asked for. Numbers above 1e8 are not
            counted: they are masks.
    """

    def __init__(self, dtype: torch.dtype, *, sizes: bool = False) -> None:
        super().__init__()
        self.eps = torch.finfo(dtype).eps
        self.largest = 0.0
        self._sizes = sizes

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = _floats(result)
        if found:
            given = min(map(_eps, _floats(args)), default=1.0)
            self.eps = max([self.eps, *(eps for eps in map(_eps, found) if eps > given)])
        for value in found if self._sizes else ():
            # Numbers of sparse tensors, and those inside torch.func's transforms, are not shown.
            with contextlib.suppress(RuntimeError):
                counted = value.detach().abs()
                counted = counted[counted < _MASK]
                self.largest = max(self.largest, float(counted.max()) if counted.numel() else 0.0)
        return result


def _floats(values: Any) -> list[Tensor]:
    leaves = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
    return [value for value in leaves if value.is_floating_point() or value.is_complex()]


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps

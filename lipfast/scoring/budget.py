"""A limit on what building a model may allocate: its sizes come from untrusted metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lipfast.errors import ArgumentError

_FLOOR = 1 << 24  # elements that any model may have
_PER_BYTE = 4  # elements per byte of the checkpoint: temporaries of the initialisation included
_PER_CALL = 2048  # elements that a tensor counts at least: modules take memory, too


def elements_allowed(size: int) -> int:
    """How many elements the model of a checkpoint of `size` bytes may create."""
    return _FLOOR + _PER_BYTE * size


class BudgetError(ArgumentError):
    """The metadata of a checkpoint asks for a model that is far larger than the checkpoint."""


class ElementBudget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the elements of the tensors that are created, before they are.

    Args:
        elements: how many there may be.

    Raises:
        BudgetError: on the way, there are more.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed = self.left = elements

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not any(isinstance(arg, (Tensor, list)) and _has_tensor(arg) for arg in args):
            self.left -= max(_PER_CALL, _elements(args))
            if self.left < 0:
                raise BudgetError(
                    f"the metadata asks for a model of more than {self.allowed} elements, far "
                    "beyond what the checkpoint holds. Check its metadata, or override it with "
                    "--arch-arg"
                )
        return func(*args, **(kwargs or {}))


def _has_tensor(arg: Tensor | list[Any]) -> bool:
    return isinstance(arg, Tensor) or any(isinstance(entry, Tensor) for entry in arg)


def _elements(args: Sequence[Any]) -> int:
    """Elements that a factory such as `empty(size)`, `arange(end)` or `eye(n, m)` makes."""
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else args
    numbers = [abs(int(n)) for n in sizes if isinstance(n, (int, float)) and math.isfinite(n)]
    return math.prod(number for number in numbers if number)

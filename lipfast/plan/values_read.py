"""Which lines of a model read the values of its samples while it is evaluated.

A trace knows no values: where Python asks for one, it fails. A model that goes on all the same (a
``try`` around ``float(x)``, a question whether it is traced) is traced as if it never asked.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lipfast.plan.untraceable import is_users

# Functions by their names (overloads of ops follow after a dot) whose results tell values.
_TELLING = frozenset(
    [
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "__contains__",
        "__array__",
        "__dlpack__",
        "item",
        "tolist",
        "numpy",
        "is_nonzero",
        "equal",
        "allclose",
        "_local_scalar_dense",
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "storage",
        "untyped_storage",
        "data_ptr",
        "to_sparse",
        "to_sparse_csr",
        "to_sparse_csc",
        "to_sparse_bsr",
        "to_sparse_bsc",
    ]
)
# Where torch's Python stands between a user's line and such a function.
_TORCHS_PYTHON = tuple(
    str(Path(torch.__file__).parent / file)
    for file in (
        *("_tensor.py", "overrides.py", "functional.py", "_jit_internal.py"),
        *("_ops.py", "serialization.py"),
    )
)


class ValuesRead(TorchFunctionMode):
    """Notes where values that depend on samples are read, but for what torch's own code reads.

    Args:
        samples: the inputs.

    Attributes:
        at: file and line of the first that reads one; empty if none does.
    """

    def __init__(self, samples: Sequence[Tensor]) -> None:
        super().__init__()
        self.at = ""
        # By ids, which may be given again: so the tensors, too, which must not be kept alive.
        self._dependent: dict[int, weakref.ref[Tensor]] = {}
        self._mark(samples)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if self._depends(leaf)]
        if not given:
            return func(*args, **kwargs)
        if not self.at and _tells(func.__name__.partition(".")[0], args, given):
            self.at = _line_of_user()
        result = func(*args, **kwargs)
        # The first argument may have been written.
        self._mark(tree_leaves((result, args[:1], kwargs.get("out"))))
        return result

    def _depends(self, value: object) -> bool:
        found = self._dependent.get(id(value))
        return found is not None and found() is value

    def _mark(self, values: Sequence[object]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._dependent[id(value)] = weakref.ref(value)


def _tells(name: str, args: Sequence[Any], given: Sequence[Tensor]) -> bool:
    if name == "__getitem__":  # its shape is that of what a mask lets through
        return any(leaf is not args[0] and leaf.dtype is torch.bool for leaf in given)
    return name in _TELLING or (name == "where" and len(args) == 1)


def _line_of_user() -> str:
    """The line that called a function of torch; empty where torch itself did."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in _TORCHS_PYTHON:
        frame = frame.f_back
    if frame is None or not is_users(frame.f_code.co_filename):
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"

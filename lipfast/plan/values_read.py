"""Which lines of a model read the values of its samples while it is evaluated.

A trace knows no values: where Python asks for one, it fails. A model that goes on all the same (a
``try`` around ``float(x)``, a question whether it is traced) is traced as if it never asked.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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
        *("_ops.py", "serialization.py", "_compile.py", "_dynamo/eval_frame.py"),
    )
)


# Ops that do, however they are called: by code that modes of torch functions do not see, too
# (TorchScript, hooks of a derivative, `torch._C.DisableTorchFunction`).
_TELLING_OPS = frozenset(
    f"aten::{name}" for name in ("_local_scalar_dense", "equal", "nonzero", "masked_select")
)


class ValuesRead:
    """Notes where values that depend on samples are read, but for what torch's own code reads.

    Args:
        samples: the inputs.

    Attributes:
        at: file and line of the first that reads one; empty if none does.
    """

    def __init__(self, samples: Sequence[Tensor]) -> None:
        self.at = ""
        self._functions, self._ops = _FunctionsSeen(self, samples), _OpsSeen(self, samples)

    def __enter__(self) -> ValuesRead:
        with ExitStack() as stack:
            stack.enter_context(self._functions)
            stack.enter_context(self._ops)
            self._modes = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.__exit__(*error)

    def note(self) -> None:
        """Note the line of the user's that called what calls this."""
        self.at = self.at or _line_of_user(3)


class _FunctionsSeen(TorchFunctionMode):
    """What Python calls; some of that is no op, such as the address of the memory."""

    def __init__(self, found: ValuesRead, samples: Sequence[Tensor]) -> None:
        super().__init__()
        self._found = found
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
        if _tells(func.__name__.partition(".")[0], args, given):
            self._found.note()
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


class _OpsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What reaches torch's dispatcher, whoever called it.

    Tensors are told by their memory: autograd has others of the same.
    """

    def __init__(self, found: ValuesRead, samples: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found
        self._dependent: dict[int, StorageWeakRef] = {}
        self._mark(samples)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what is asked here is no question of the user's
            if not any(map(self._depends, tree_leaves((args, kwargs)))):
                return func(*args, **kwargs)
            if func._schema.name in _TELLING_OPS:
                self._found.note()
            result = func(*args, **kwargs)
            self._mark(tree_leaves((result, args[:1], kwargs.get("out"))))
            return result

    def _depends(self, value: object) -> bool:
        key = _memory_of(value)
        found = None if key is None else self._dependent.get(key.cdata)
        return found is not None and not found.expired()  # type: ignore[no-untyped-call]

    def _mark(self, values: Sequence[object]) -> None:
        for key in filter(None, map(_memory_of, values)):
            self._dependent[key.cdata] = key


def _memory_of(value: object) -> StorageWeakRef | None:
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
    return None


def _tells(name: str, args: Sequence[Any], given: Sequence[Tensor]) -> bool:
    if name == "__getitem__":  # its shape is that of what a mask lets through
        return any(leaf is not args[0] and leaf.dtype is torch.bool for leaf in given)
    return name in _TELLING or (name == "where" and len(args) == 1)


def _line_of_user(above: int) -> str:
    """The line that called a function of torch; empty where torch itself did."""
    frame: FrameType | None = sys._getframe(above)
    while frame is not None and frame.f_code.co_filename in _TORCHS_PYTHON:
        frame = frame.f_back
    if frame is None or not is_users(frame.f_code.co_filename):
        return ""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"

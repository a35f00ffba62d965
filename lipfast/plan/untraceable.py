"""Why `torch.export` cannot trace a model, in the words of somebody who wrote the model."""

from __future__ import annotations

import ast
import contextlib
import linecache
import logging
import os
import sys
import textwrap
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lipfast.errors import TraceError

# Folders of torch, Python and lipfast, and what stands for files that nobody wrote.
_HOMES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, contextlib.__file__))
_OWN = f"{Path(__file__).parent.parent}{os.sep}"
_WITHOUT_FILES = ("<frozen ", "<eval_with_key>", "<__array_function__")
_INSTALLED = ("site-packages", "dist-packages")
# Numbers of samples that a condition is tried with: one that holds for all of them decides nothing.
_TRIED = (*range(2, 260), *(2**power + off for power in range(9, 17) for off in (-1, 0, 1)))
_LONGEST_STATEMENT = 12
_EXPORT_ADVICE = (
    "Export the model yourself (torch.export.export(model, args, strict=False or strict=True, "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))), save it with torch.export.save, and pass "
    "the ExportedProgram or the path of the .pt2 file instead of the model."
)


def head_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def where(error: BaseException) -> str:
    """File and line of the last frame outside torch and lipfast, as the end of a phrase."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        if is_users(traceback.tb_frame.f_code.co_filename):
            frames.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return f" (at {frames[-1]})" if frames else ""


def is_users(file: str) -> bool:
    """Whether a file belongs neither to torch, nor to Python, nor to lipfast.

    What is typed in (``<stdin>``, ``<string>``, a cell) is a user's.
    """
    if file.startswith((_HOMES[0], _OWN, *_WITHOUT_FILES)):
        return False
    inside = file.removeprefix(_HOMES[1])
    return inside == file or inside.startswith(_INSTALLED)


def reason(name: str, error: BaseException, fixed_at: str) -> str:
    """Why a model could not be traced, and what to do.

    Args:
        name: of the model.
        error: of `torch.export`.
        fixed_at: the line that fixed a size, if one did.
    """
    text = str(error)
    if "Constraints violated" in text and ".size()[0]" in text:
        return (
            f"{name} fixes the number of samples{fixed_at}, and lipfast traces it for any number. "
            "Keep x.shape[0] as it is, as in x.reshape(x.shape[0], -1): len(x), "
            "int(x.shape[0]), loops over the samples and a number in its place fix it."
        )
    if "data-dependent" in text:
        return (
            f"{name} decides by the values of a tensor{where(error)}, as in if, while, float(x) or "
            f"x.item(), and has no graph then ({head_line(error)}). Use torch.where and keep "
            f"numbers as tensors. {_EXPORT_ADVICE}"
        )
    if ".numpy()" in text:
        return f"{name} leaves torch for numpy{where(error)}: use torch's functions instead."
    return (
        f"torch.export could not trace {name}{where(error)}: {head_line(error)}. {_EXPORT_ADVICE}"
    )


def require_any_number(name: str, program: ExportedProgram) -> None:
    """Check that nothing decides by the number of samples, neither the model nor what it calls.

    Conditions that hold for any number, and those that an assertion compares, decide nothing.

    Raises:
        TraceError: something does; says which line.
    """
    inputs = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    sizes = [value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()]
    symbols: list[Any] = [size for size in sizes if not isinstance(size, int)]
    for guard in symbols[0].node.shape_env.guards if symbols else ():
        frame = guard.sloc.framework_loc
        file = getattr(frame, "filename", "")
        if _always_holds(guard.expr) or (is_users(file) and _only_asserts(file, frame.lineno)):
            continue
        at = f"{file}:{frame.lineno}" if is_users(file) else guard.sloc.maybe_user_loc
        at = f" (at {at})" if at else f" (where {guard.expr})"
        raise TraceError(
            f"{name} decides by the number of samples{at}: what a sample gives would depend on how "
            "many there are"
        )


def _always_holds(condition: Any) -> bool:
    """Whether a condition holds for all numbers of samples that are tried, of all inputs alike."""
    from sympy import Integer  # type: ignore[import-untyped]  # noqa: PLC0415 (slow to start)

    symbols = condition.free_symbols
    return all(bool(condition.xreplace(dict.fromkeys(symbols, Integer(size)))) for size in _TRIED)


def _only_asserts(file: str, number: int) -> bool:
    """Whether a line begins a statement that asserts a comparison, and can do nothing else."""
    lines = linecache.getlines(file)[number - 1 : number - 1 + _LONGEST_STATEMENT]
    statement: ast.stmt | None = None
    for end in range(1, len(lines) + 1):
        with contextlib.suppress(SyntaxError, ValueError):
            (statement,) = ast.parse(textwrap.dedent("".join(lines[:end]))).body
            break
    if not isinstance(statement, ast.Assert):
        return False
    for part in ast.walk(statement.test):
        if isinstance(part, ast.Call):
            called = getattr(part.func, "attr", getattr(part.func, "id", ""))
            if called not in ("size", "dim", "isinstance"):
                return False
        elif isinstance(part, (ast.NamedExpr, ast.IfExp, ast.Lambda, ast.comprehension)):
            return False
    return True


class SizesFixed(logging.Handler):
    """Hears of the sizes that torch fixes, and keeps which line of the user's fixed the first.

    Attributes:
        at: file and line, as the end of a phrase.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.at = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Look at who calls."""
        message = record.getMessage()
        if self.at or "[guard added]" not in message or not message.startswith("eval Eq"):
            return
        frame: FrameType | None = sys._getframe()
        while frame is not None and not is_users(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            self.at = f" (at {frame.f_code.co_filename}:{frame.f_lineno})"

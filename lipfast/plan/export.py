"""Modules as exported programs: `torch.export`, ``.pt2`` files, errors in the caller's words."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node as FxNode

from lipfast.errors import ArgumentError, TraceError
from lipfast.ops.restoring import Restoring
from lipfast.plan.batch_first import samples_in_front
from lipfast.plan.canonical import TRAINING_FLAGS
from lipfast.plan.evaluated import require_evaluates
from lipfast.plan.modules import evaluation_mode, require_floating_modules
from lipfast.plan.outputs import is_known_to_torch, returned_tensors, returning_tensors
from lipfast.plan.strays import Strays
from lipfast.plan.untraceable import SizesFixed, head_line, reason, require_any_number
from lipfast.rules.registry import rule_of

# What of torch reports on a trace, the first of them on sizes.
_LOUD = (
    "fx.experimental.symbolic_shapes",
    "_subclasses.fake_tensor",
    "_export.non_strict_utils",
    "export",
)
# Floating dtypes beside these are for storage.
_CALCULATED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# torch.export changes the process's state (modules' calls, flags that say "exporting").
_EXPORTING = threading.RLock()
_Within = Callable[[nn.Module], contextlib.AbstractContextManager[object]]


def load_program(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file.

    Raises:
        TraceError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise TraceError(f"{path}: no such file; expected one written by torch.export.save")
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive fails in many ways
        raise TraceError(
            f"{path}: not a program written by torch.export.save ({head_line(error)})"
        ) from error


def example_inputs(example: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """At least two samples of each input, checked.

    Raises:
        ArgumentError: see `plan.trace.trace`.
    """
    if example is None:
        raise ArgumentError("a module needs an example input: a tensor of samples")
    several = isinstance(example, (tuple, list))
    inputs: tuple[Any, ...] = tuple(example) if several else (example,)
    if not inputs:
        raise ArgumentError("the example input is empty: give at least one tensor")
    for value in inputs:
        if not isinstance(value, Tensor):
            raise ArgumentError(
                f"the example input must be a tensor or a tuple of them, not {type(value).__name__}"
            )
        check_floating_input(value)
        if value.is_meta:
            raise ArgumentError("the example input holds no data (device meta): give real samples")
        if value.dim() == 0 or value.shape[0] == 0:
            raise ArgumentError(
                f"the example input has shape {tuple(value.shape)}: the first dimension must be "
                "the samples, at least one of them"
            )
    # torch.export would take a single sample to mean "always one sample".
    return tuple(
        torch.cat([value, value]) if value.shape[0] == 1 else value
        for value in (value.detach() for value in inputs)
    )


def check_floating_input(value: Tensor) -> None:
    """Refuse integer, complex and sparse inputs, with the reason.

    Raises:
        ArgumentError: `value` is not a dense tensor of a floating dtype that torch calculates in.
    """
    if value.is_nested:
        raise ArgumentError(
            "the samples are a nested tensor: give dense ones of one shape (torch.stack, or "
            "x.to_padded_tensor(0.0) where padding does not matter)"
        )
    if value.layout != torch.strided:
        raise ArgumentError(f"the samples are {value.layout}: pass a dense tensor (x.to_dense())")
    if value.is_complex():
        raise ArgumentError(
            f"inputs of dtype {value.dtype}: complex numbers are not supported. Give the real and "
            "imaginary parts (torch.view_as_real) to a module that puts them together again "
            "(torch.view_as_complex)."
        )
    if value.dtype.is_floating_point and value.dtype not in _CALCULATED:
        raise ArgumentError(
            f"inputs of dtype {value.dtype}: torch does not calculate in it. Convert them with "
            ".float()."
        )
    if not value.dtype.is_floating_point:
        raise ArgumentError(
            f"inputs of dtype {value.dtype}: a Lipschitz constant is a ratio of distances and "
            "integers such as token ids have none. Convert numbers with .float(); for tokens, "
            "give the model from the embeddings on."
        )


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], within: _Within = contextlib.nullcontext
) -> ExportedProgram:
    """The program of a module in eval mode, for any number of samples.

    Args:
        module: left as it is found.
        inputs: samples of each input.
        within: what to enter, with the module, while it is traced.

    Raises:
        ArgumentError: a parameter is not initialised, or weights are quantised.
        TraceError: `torch.export` or the module itself fails on the inputs.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("TorchScript modules cannot be traced: give the original nn.Module")
    require_floating_modules(module)
    sizes, strays = SizesFixed(), Strays(module)
    undo = Restoring(strays.drop)
    try:
        with undo, undo, undo:
            program = strays.program = _exported(module, inputs, sizes, within, strays)
    except Exception as error:  # user code runs here: anything may come out
        outputs = require_evaluates(module, inputs)
        found = tuple(returned_tensors(outputs))  # or what it returns holds none that can be seen
        if found and not is_known_to_torch(outputs):
            with evaluation_mode(module):
                return exported(returning_tensors(module), inputs, within)
        raise TraceError(reason(type(module).__name__, error, sizes.at)) from error
    require_any_number(type(module).__name__, program)
    if strays.holders:
        require_evaluates(module, inputs)  # which writes over what the trace wrote elsewhere
        strays.drop()
    if strays.holders:
        raise TraceError(
            f"{type(module).__name__} keeps tensors of its trace outside of the module, in "
            f"{', '.join(strays.holders)}: they hold no numbers. Set it anew, and keep it in the "
            "module"
        )
    return program


def _exported(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    sizes: logging.Handler,
    within: _Within,
    strays: Strays,
) -> ExportedProgram:
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs)
    # Without gradients a model's own no_grad blocks leave no trace in the graph. The module comes
    # before the lock: who evaluates it may wait for that to trace it.
    with (
        evaluation_mode(module),
        _EXPORTING,
        samples_in_front(module),
        within(module),
        torch.no_grad(),
        warnings.catch_warnings(),
        _quiet_export(sizes),
        strays,
    ):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _quiet_export(sizes: logging.Handler) -> Iterator[None]:
    """Keep torch's own reports off the log: our error says what they say, of sizes by a handler."""
    loggers = [logging.getLogger(f"torch.{name}") for name in _LOUD]
    found = [(logger, logger.level) for logger in loggers]
    heard = loggers[0]
    handlers, propagate, stderr = heard.handlers, heard.propagate, sys.stderr

    def put_back() -> None:
        sys.stderr = stderr
        heard.handlers, heard.propagate = handlers, propagate
        for logger, level in found:
            logger.setLevel(level)

    undo = Restoring(put_back)
    with undo, undo, undo:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        heard.setLevel(logging.INFO)
        heard.handlers, heard.propagate = [sizes], False
        sys.stderr = io.StringIO()  # a failed trace prints its graph
        yield


def op_name(target: object) -> str:
    """Name of what a node of an exported graph calls, such as ``aten.linear``."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).replace("::", ".")
    module = str(getattr(target, "__module__", ""))
    return f"{module}.{getattr(target, '__name__', target)}".lstrip(".")


def module_path(node: FxNode) -> str:
    """Path of the module that a node came from; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def constants_read(program: ExportedProgram) -> dict[str, Tensor]:
    """Tensors beside the state dict that a program computes with, those of the module itself.

    Numbers that forward writes out, such as ``torch.tensor([1.0, 2.0])``, are nobody's: they are
    copied and detached where they are read. Arrays of numpy are copied only.
    """
    read = {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder"
        if any(not _is_written_out(user) for user in node.users)
    }
    names = {spec.target for spec in program.graph_signature.input_specs if spec.arg.name in read}
    return {
        name: value
        for name, value in program.constants.items()
        if name in names and isinstance(value, Tensor)
    }


def _is_written_out(copy: FxNode) -> bool:
    users = {op_name(user.target) for user in copy.users}
    return op_name(copy.target) == "aten.lift_fresh_copy" and users == {"aten.detach_"}


def refuse_training(program: ExportedProgram) -> None:
    """Check that a program was exported in eval mode.

    Raises:
        TraceError: an op or a buffer says that it was not.
    """
    for node in program.graph.nodes:
        op = op_name(node.target)
        position = rule_of(op).training or TRAINING_FLAGS.get(op)
        # Without running statistics it takes those of the batch in any mode: its rule refuses that.
        if op == "aten.batch_norm" and node.args[3] is None:
            continue
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise TraceError(
                f"module '{module_path(node)}' runs {op} in training mode. "
                "Call model.eval() before torch.export.export, and give functional dropout "
                "training=self.training."
            )
    for output in program.graph_signature.output_specs:
        if output.kind is OutputKind.BUFFER_MUTATION:
            raise TraceError(
                f"the exported program writes to its buffer '{output.target}': it was exported in "
                "training mode. Call model.eval() before torch.export.export."
            )


def without_in_place_ops(program: ExportedProgram) -> ExportedProgram:
    """Replace in-place operations, if there are any, without decomposing the others."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and op_name(node.target) != "aten.detach_":
            return _without_mutations(program)
    return program


def _without_mutations(program: ExportedProgram) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replaced: ExportedProgram = program.run_decompositions({})
            return replaced
    except Exception as error:  # torch's passes fail in many ways
        raise TraceError(
            "torch.export could not replace the in-place operations of the model, for instance "
            f"what it writes to a buffer ({head_line(error)}). Keep results in local variables "
            "instead of buffers, or register the cache as a plain attribute."
        ) from error


def exported_module(source: ExportedProgram | str | os.PathLike[str]) -> nn.Module:
    """The module of an exported program or a ``.pt2`` file.

    Raises:
        TraceError: the file cannot be read, or the program was exported in training mode.
    """
    program = source if isinstance(source, ExportedProgram) else load_program(Path(source))
    refuse_training(program)
    return program.module()

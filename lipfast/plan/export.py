"""Modules as exported programs: `torch.export`, ``.pt2`` files, errors in the caller's words."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node as FxNode

from lipfast.errors import ArgumentError, TraceError
from lipfast.plan.batch_first import samples_in_front
from lipfast.plan.canonical import TRAINING_FLAGS
from lipfast.plan.modules import evaluation_mode, require_floating_modules
from lipfast.rules.registry import rule_of

_EXPORT_ADVICE = (
    "Export the model yourself (torch.export.export(model, args, strict=False or strict=True, "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))), save it with torch.export.save, and pass "
    "the ExportedProgram or the path of the .pt2 file instead of the model."
)
# torch.export changes the process's state (modules' calls, flags that say "exporting").
_EXPORTING = threading.RLock()


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
            f"{path}: not a program written by torch.export.save ({_head_line(error)})"
        ) from error


def _head_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def example_inputs(example: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """At least two samples of each input, checked.

    Raises:
        ArgumentError: see `plan.trace.trace`.
    """
    if example is None:
        raise ArgumentError("a module needs an example input: a tensor of samples")
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
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
    """Refuse integer inputs, with the reason.

    Raises:
        ArgumentError: `value` is not a tensor of a floating dtype.
    """
    if not value.dtype.is_floating_point:
        raise ArgumentError(
            f"inputs of dtype {value.dtype}: a Lipschitz constant is a ratio of distances and "
            "integers such as token ids have none. Convert numbers with .float(); for tokens, "
            "give the model from the embeddings on."
        )


def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The program of a module in eval mode, for any number of samples.

    Raises:
        ArgumentError: a parameter is not initialised, or weights are quantised.
        TraceError: `torch.export` or the module itself fails on the inputs.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("TorchScript modules cannot be traced: give the original nn.Module")
    require_floating_modules(module)
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs)
    try:
        # Without gradients a model's own no_grad blocks leave no trace in the graph. The module
        # comes before the lock: who evaluates it may wait for that to trace it.
        with (
            evaluation_mode(module),
            _EXPORTING,
            samples_in_front(module),
            torch.no_grad(),
            warnings.catch_warnings(),
            _quiet_export(),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # user code runs here: anything may come out
        _require_evaluates(module, inputs)
        where = _where(error)
        raise TraceError(
            f"torch.export could not trace {type(module).__name__}{where}: "
            f"{_head_line(error)}. {_EXPORT_ADVICE}"
        ) from error
    # What goes through Tensor.data leaves no trace in the graph: only an evaluation shows it.
    state = (*module.parameters(), *module.buffers())
    if not any(value.is_meta for value in state):
        _require_evaluates(module, inputs)
    return program


def _require_evaluates(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Evaluate a module: if torch.export failed, its own error says more than torch.export's.

    Raises:
        TraceError: the module cannot be evaluated on the inputs, or writes to its tensors.
    """
    try:
        with evaluation_mode(module) as kept, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.no_grad():
                    module(*(value.clone() for value in inputs))
            except RuntimeError:  # a derivative inside forward may need autograd
                with torch.enable_grad():
                    module(*(value.clone().requires_grad_() for value in inputs))
            written = kept.rewritten()
    except Exception as error:  # user code runs here: anything may come out
        shapes = ", ".join(str(tuple(value.shape[1:])) for value in inputs)
        raise TraceError(
            f"{type(module).__name__} cannot be evaluated on samples of shape {shapes}"
            f"{_where(error)}: {_head_line(error)}. Check the data: its first dimension is the "
            "sample, the others are what the model takes."
        ) from error
    if written:
        raise TraceError(
            f"{type(module).__name__} writes its {', '.join(written)} in forward, even in eval "
            "mode: then its outputs are no function of parameters and inputs that can be traced. "
            "Evaluate the model once, if this initialises it, or write in training mode only "
            "(if self.training)"
        )


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch's own reports off the log: our error says what they say."""
    names = (
        "torch.fx.experimental.symbolic_shapes",
        "torch._subclasses.fake_tensor",
        "torch._export.non_strict_utils",
        "torch.export",
    )
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()):  # a failed trace prints its graph
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _where(error: BaseException) -> str:
    """File and line of the last frame outside torch and lipfast."""
    frames = []
    traceback = error.__traceback__
    torch_root = str(Path(torch.__file__).parent)
    library = str(Path(contextlib.__file__).parent)
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith((torch_root, library, str(Path(__file__).parent), "<")):
            frames.append(f"{name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return f" (at {frames[-1]})" if frames else ""


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
            f"what it writes to a buffer ({_head_line(error)}). Keep results in local variables "
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

"""Trace an architecture with `torch.export` into a graph that holds no weights."""

from __future__ import annotations

import contextlib
import io
import math
import operator
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import Node as FxNode

from lipfast.errors import ArgumentError, TraceError, naming
from lipfast.graph.nodes import Argument, Constant, Graph, Node, Reference, computed_name
from lipfast.plan.architecture import Architecture
from lipfast.plan.batch_first import samples_in_front
from lipfast.plan.canonical import (
    Call,
    beside_the_samples,
    first_tensor,
    from_the_front,
    only_constants,
    part,
    rank_of_first_tensor,
)
from lipfast.plan.computed import exact_value
from lipfast.plan.simplify import join_attention, join_products, simplify
from lipfast.plan.split import SIZED, split_computed, without_bound
from lipfast.rules.registry import require_rules

# A tensor that is not in the state dict is kept in the plan up to this many entries.
MAX_CONSTANT_ENTRIES = 4096

_ADVICE = (
    "Export the model yourself (torch.export.export(model, args, strict=False or strict=True, "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))), save it with torch.export.save, and pass "
    "the ExportedProgram or the path of the .pt2 file instead of the model."
)
# Position of the flag that says "training", per op.
_TRAINING_FLAGS = {
    "aten.dropout": 2,
    "aten.alpha_dropout": 2,
    "aten.feature_dropout": 2,
    "aten.feature_alpha_dropout": 2,
    "aten.native_dropout": 2,
    "aten.batch_norm": 5,
    "aten.native_batch_norm": 5,
    "aten.rrelu": 3,
    "aten._native_batch_norm_legit": 5,
}
_CHECKS = frozenset(
    {
        "aten._assert_tensor_metadata",
        "aten._assert_async",
        "aten._assert_scalar",
        "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size",
    }
)
_MADE_LIKE = {
    "aten.new_zeros": "aten.zeros",
    "aten.new_ones": "aten.ones",
    "aten.new_full": "aten.full",
}
# torch.export changes the process's state (modules' calls, flags that say "exporting").
_EXPORTING = threading.RLock()
Source = nn.Module | ExportedProgram | str | os.PathLike[str]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel or `torch.compile`."""
    while True:
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode and uncompiled inside, exactly as it was afterwards.

    Flags are set directly: `Module.train` may be overridden to do more. The random number
    generators are restored as well, and what forward puts in the place of buffers and other
    attributes (a cache would keep a tensor of the trace, without data).
    """
    modules = list(model.modules())
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_attributes_kept(module))
        with _in_evaluation_mode(modules):
            yield


@contextlib.contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    attributes = vars(module)
    tables = [attributes, module._buffers]
    tables += [value for value in attributes.values() if type(value) is dict]
    copies = [dict(table) for table in tables]
    lists = [value for value in attributes.values() if type(value) is list]
    entries = [list(value) for value in lists]
    try:
        yield
    finally:
        for table, copy in zip(tables, copies, strict=True):
            for name in table.keys() - copy.keys():
                del table[name]
            for name, value in copy.items():
                if name not in table or table[name] is not value:
                    table[name] = value
        for found, copied in zip(lists, entries, strict=True):
            if list(map(id, found)) != list(map(id, copied)):
                found[:] = copied


@contextlib.contextmanager
def _in_evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    flags = [module.training for module in modules]
    compiled = [getattr(module, "_compiled_call_impl", None) for module in modules]
    try:
        for module in modules:
            module.training = False
            if getattr(module, "_compiled_call_impl", None) is not None:
                module._compiled_call_impl = None
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, flag, implementation in zip(modules, flags, compiled, strict=True):
            module.training = flag
            if implementation is not None:
                module._compiled_call_impl = implementation


def trace(model: Source, example_input: Tensor | Sequence[Tensor] | None = None) -> Architecture:
    """Trace a model in eval mode, with any number of samples.

    Args:
        model: a module (may be wrapped in DataParallel or compiled), an `ExportedProgram`, or the
            path of a ``.pt2`` file.
        example_input: a tensor whose first dimension is the sample, or a tuple of such tensors for
            a model with several inputs; not needed for an exported program.

    Returns:
        The simplified graph, in which every node has a rule.

    Raises:
        ArgumentError: the example input is missing, not floating, or has no sample dimension.
        TraceError: the model cannot be traced, or was exported in training mode.
        UnsupportedOpError: it holds ops without a rule (all are listed).
    """
    if isinstance(model, (str, os.PathLike)):
        program = _load(Path(model))
        return _convert(program, program.state_dict)
    if isinstance(model, ExportedProgram):
        return _convert(model, model.state_dict)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            "model must be an nn.Module, an ExportedProgram or the path of a .pt2 file, "
            f"not {type(model).__name__}"
        )
    module = unwrap(model)
    program = _export(module, _example(example_input))
    return _convert(program, module.state_dict(keep_vars=True))


def _load(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise TraceError(f"{path}: no such file; expected one written by torch.export.save")
    try:
        program: ExportedProgram = torch.export.load(path)
        return program
    except Exception as error:  # a damaged archive fails in many ways
        raise TraceError(
            f"{path}: not a program written by torch.export.save ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _example(example: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
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


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("TorchScript modules cannot be traced: give the original nn.Module")
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs)
    try:
        # Without gradients a model's own no_grad blocks leave no trace in the graph.
        with (
            _EXPORTING,
            evaluation_mode(module),
            samples_in_front(module),
            torch.no_grad(),
            warnings.catch_warnings(),
            _quiet_export(),
        ):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # user code runs here: anything may come out
        _require_evaluates(module, inputs)
        where = _where(error)
        raise TraceError(
            f"torch.export could not trace {type(module).__name__}{where}: "
            f"{_first_line(error)}. {_ADVICE}"
        ) from error


def _require_evaluates(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Evaluate a module that could not be traced: its own error says more than torch.export's.

    Raises:
        TraceError: the module cannot be evaluated on the inputs either.
    """
    try:
        with evaluation_mode(module), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module(*(value.clone() for value in inputs))
    except Exception as error:  # user code runs here: anything may come out
        shapes = ", ".join(str(tuple(value.shape[1:])) for value in inputs)
        raise TraceError(
            f"{type(module).__name__} cannot be evaluated on samples of shape {shapes}"
            f"{_where(error)}: {_first_line(error)}. Check the data: its first dimension is the "
            "sample, the others are what the model takes."
        ) from error


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch's own reports off the log: our error says what they say."""
    import logging  # noqa: PLC0415

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


def _op_name(target: object) -> str:
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).replace("::", ".")
    module = str(getattr(target, "__module__", ""))
    return f"{module}.{getattr(target, '__name__', target)}".lstrip(".")


def _module_path(node: FxNode) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def _refuse_training(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        position = (
            _TRAINING_FLAGS.get(_op_name(node.target)) if node.op == "call_function" else None
        )
        op = _op_name(node.target)
        # Without running statistics it takes those of the batch in any mode: its rule refuses that.
        if op == "aten.batch_norm" and node.args[3] is None:
            continue
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise TraceError(
                f"module '{_module_path(node)}' runs {_op_name(node.target)} in training mode. "
                "Call model.eval() before torch.export.export, and give functional dropout "
                "training=self.training."
            )
    for output in program.graph_signature.output_specs:
        if output.kind is OutputKind.BUFFER_MUTATION:
            raise TraceError(
                f"the exported program writes to its buffer '{output.target}': it was exported in "
                "training mode. Call model.eval() before torch.export.export."
            )


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Replace in-place operations, if there are any, without decomposing the others."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and _op_name(node.target) != "aten.detach_":
            return _without_mutations(program)
    return program


def _without_mutations(program: ExportedProgram) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:  # torch's passes fail in many ways
        raise TraceError(
            "torch.export could not replace the in-place operations of the model, for instance "
            f"what it writes to a buffer ({_first_line(error)}). Keep results in local variables "
            "instead of buffers, or register the cache as a plain attribute."
        ) from error


@dataclass
class _Conversion:
    """State of the walk over an exported graph."""

    program: ExportedProgram
    values: dict[FxNode, Argument] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    floating: dict[str, bool] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    whole_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    batch: Any = None
    dtypes: list[torch.dtype] = field(default_factory=list)


def _convert(program: ExportedProgram, state_dict: Mapping[str, Any]) -> Architecture:
    _refuse_training(program)
    program = _functional(program)
    state = _Conversion(program)
    specs = {
        spec.arg.name: spec
        for spec in program.graph_signature.input_specs
        if isinstance(spec.arg, TensorArgument)
    }
    outputs: tuple[str, ...] = ()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _placeholder(state, node, specs.get(node.name))
        elif node.op == "output":
            outputs = _outputs(state, node)
        elif node.op == "call_function":
            _call(state, node)
        else:
            state.nodes.append(Node(node.name, f"{node.op}.{node.target}"))
            state.values[node] = Reference("node", node.name)
    shapes = {
        name: tuple(value.shape) for name, value in state_dict.items() if isinstance(value, Tensor)
    }
    ranks = {name: len(shape) for name, shape in shapes.items()}
    graph = simplify(Graph(tuple(state.nodes), outputs), state.floating, ranks)
    graph, computed = split_computed(graph, state.whole_shapes)
    if computed:
        ranks |= {computed_name(node.name): len(node.shape) for node in computed}
        graph = join_products(graph, ranks)
    graph = join_attention(graph)
    _validate(graph, computed, state)
    nodes = (*graph.nodes, *computed)
    used = {ref.name for node in nodes for ref in node.references() if ref.kind == "constant"}
    constants = {name: value for name, value in state.constants.items() if name in used}
    return Architecture(graph, shapes, aliases_of(state_dict), constants, state.dtypes[0], computed)


def _placeholder(state: _Conversion, node: FxNode, spec: Any) -> None:
    if spec is None or isinstance(spec.arg, ConstantArgument):
        state.values[node] = None
        return
    if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
        state.values[node] = Reference("parameter", spec.target)
        state.floating[f"parameter:{spec.target}"] = node.meta["val"].dtype.is_floating_point
    elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        state.values[node] = Reference("constant", spec.target)
        state.floating[f"constant:{spec.target}"] = node.meta["val"].dtype.is_floating_point
        _keep_constant(state, spec.target)
    elif spec.kind is InputKind.USER_INPUT:
        _input(state, node)
    else:
        raise TraceError(f"input '{node.name}' of kind {spec.kind.name} is not supported")


def _keep_constant(state: _Conversion, name: str) -> None:
    tensor = state.program.constants.get(name)
    if not isinstance(tensor, Tensor):
        raise TraceError(f"the value of constant '{name}' is not in the exported program")
    if tensor.numel() > MAX_CONSTANT_ENTRIES:
        raise TraceError(
            f"constant '{name}' of shape {tuple(tensor.shape)} is not in the state dict and too "
            f"large for a plan (more than {MAX_CONSTANT_ENTRIES} entries): make it a parameter or "
            "a persistent buffer (register_buffer)"
        )
    if tensor.is_complex():
        raise TraceError(f"constant '{name}' is complex: only real networks are supported")
    state.constants[name] = Constant.from_tensor(tensor)


def _input(state: _Conversion, node: FxNode) -> None:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        state.values[node] = None
        return
    check_floating_input(value)
    sizes: list[Any] = list(value.shape)
    if not sizes or isinstance(sizes[0], int):
        raise TraceError(
            f"input '{node.name}' was exported with a fixed number of samples "
            f"({tuple(value.shape)}). Export it with "
            "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)."
        )
    if state.batch is None:
        state.batch = sizes[0].node.expr
    state.dtypes.append(value.dtype)
    shape = _sample_shape(state, node.name, value)
    if shape is None:
        raise TraceError(f"input '{node.name}': {state.problems[node.name]}")
    state.nodes.append(Node(node.name, "input", shape=shape))
    state.values[node] = Reference("node", node.name)


def _multiple(state: _Conversion, size: Any) -> int:
    """k where a size is k times the number of samples, 0 where it is something else."""
    if not isinstance(size, torch.SymInt) or state.batch is None:
        return 0
    ratio = size.node.expr / state.batch
    return int(ratio) if ratio.is_Integer and ratio > 0 else 0


def _samples_at(state: _Conversion, value: Any) -> tuple[int, int]:
    """Which dimension of a tensor holds the samples, and how many entries each has there.

    Position -1 where no dimension is a multiple of the number of samples.
    """
    if isinstance(value, Tensor):
        for position, size in enumerate(value.shape):
            multiple = _multiple(state, size)
            if multiple:
                return position, multiple
    return -1, 1


def _sample_shape(state: _Conversion, name: str, value: Any) -> tuple[int, ...] | None:
    """Return the shape without its sample dimension; None (and a noted problem) if it has none.

    A first dimension of k entries per sample (attention over windows) counts as samples and k.
    """
    if not isinstance(value, Tensor):
        state.problems[name] = "its result is not one tensor"
        return None
    sizes = list(value.shape)
    shown = "(" + ", ".join(str(size) for size in sizes) + ")"
    position, multiple = _samples_at(state, value)
    if position != 0:
        state.problems[name] = (
            f"its result has shape {shown}, and the first dimension is not the samples "
            f"({state.batch}): samples must stay apart"
        )
        return None
    if any(not isinstance(size, int) for size in sizes[1:]):
        state.problems[name] = (
            f"its result has shape {shown}: only the first dimension may vary with the samples"
        )
        return None
    inside = (multiple,) if multiple > 1 else ()
    return inside + tuple(int(size) for size in sizes[1:])


def _call(state: _Conversion, node: FxNode) -> None:
    with naming(_op_name(node.target), _module_path(node)):
        _convert_call(state, node)


def _convert_call(state: _Conversion, node: FxNode) -> None:
    value = node.meta.get("val")
    if _multiple(state, value):
        state.values[node] = Reference("batch", _times(_multiple(state, value)))
        return
    op = _op_name(node.target)
    if op in _CHECKS:
        return
    args = tuple(_argument(state, entry) for entry in node.args)
    # Where a tensor lies does not matter to the function.
    kwargs = tuple(
        (key, _argument(state, entry))
        for key, entry in sorted(node.kwargs.items())
        if key not in ("device", "layout", "pin_memory", "memory_format")
    )
    if node.target is operator.getitem:
        entry = _entry(state, node)
        if entry is not None:
            op, args, kwargs = entry
    result_rank = value.dim() if isinstance(value, Tensor) else 0
    op, args, kwargs = from_the_front(op, args, kwargs, rank_of_first_tensor(node), result_rank)
    if op == "aten.rms_norm" and isinstance(value, Tensor):
        args = _with_default_eps(args, value.dtype)
    if op in _MADE_LIKE and isinstance(value, Tensor):
        op, args, kwargs = _without_pattern(op, args, kwargs)
    if _became_constant(state, node, op, args, kwargs):
        return
    if isinstance(value, Tensor):
        state.floating[node.name] = value.dtype.is_floating_point
        if not value.dtype.is_floating_point:
            state.problems[node.name] = f"its result is of dtype {value.dtype}, not floating"
        if all(isinstance(size, int) for size in value.shape):
            state.whole_shapes[node.name] = tuple(value.shape)
    op, args, kwargs = _beside_the_samples(state, node, (op, args, kwargs))
    known = _sample_shape(state, node.name, value) if node.name not in state.problems else None
    state.nodes.append(Node(node.name, op, args, kwargs, known or (), _module_path(node)))
    state.values[node] = Reference("node", node.name)


def _beside_the_samples(state: _Conversion, node: FxNode, call: Call) -> Call:
    """The call with the samples in a dimension of their own; a noted problem if it has none."""
    operand = first_tensor(node)
    position, parts = _samples_at(state, None if operand is None else operand.meta.get("val"))
    if parts == 1:
        return call
    found = beside_the_samples(call, position, parts)
    if found is None:
        state.problems[node.name] = (
            f"the samples and {parts} parts of each are one dimension, which this op may mix"
        )
    return call if found is None else found


def _times(multiple: int) -> str:
    return "" if multiple == 1 else str(multiple)


def _without_pattern(
    op: str, args: tuple[Argument, ...], kwargs: tuple[tuple[str, Argument], ...]
) -> Call:
    """``x.new_zeros(sizes)`` takes nothing but its dtype from x: ``zeros(sizes)``."""
    kept = tuple((key, entry) for key, entry in kwargs if key != "dtype")
    return _MADE_LIKE[op], args[1:], kept


def _with_default_eps(args: tuple[Argument, ...], dtype: torch.dtype) -> tuple[Argument, ...]:
    """RMSNorm without an eps takes that of the dtype that it runs in: the dtype stands for it."""
    padded = (*args, *[None] * (4 - len(args)))
    if padded[3] is not None:
        return padded
    return (*padded[:3], Reference("dtype", str(dtype).removeprefix("torch.")))


def _entry(state: _Conversion, node: FxNode) -> Call | None:
    """One entry of a tuple of results, as a call of its own."""
    source, index = node.args
    if not isinstance(source, FxNode) or not isinstance(index, int):
        return None
    args = [_argument(state, value) for value in source.args]
    return part(_op_name(source.target), source, args, index)


def _became_constant(
    state: _Conversion,
    node: FxNode,
    op: str,
    args: tuple[Argument, ...],
    kwargs: tuple[tuple[str, Argument], ...],
) -> bool:
    """Evaluate what depends on constants only (ranges, masks, indices), if it is small and exact.

    Whatever rounds is left to the computed parameters, which carry a bound of their error.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_complex() or not only_constants(args, kwargs):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    sizes = [size for size in value.shape if isinstance(size, int)]
    if len(sizes) != value.dim() or math.prod(sizes) > MAX_CONSTANT_ENTRIES:
        return False
    result = exact_value(Node(node.name, op, args, kwargs), state.constants)
    if result is None or result.shape != value.shape:
        return False
    narrow = result.to(value.dtype)
    exact = torch.equal(narrow.to(result.dtype), result)
    state.constants[node.name] = Constant.from_tensor(narrow if exact else result)
    state.values[node] = Reference("constant", node.name)
    state.floating[f"constant:{node.name}"] = value.dtype.is_floating_point
    return True


def _argument(state: _Conversion, value: Any) -> Argument:
    if isinstance(value, FxNode):
        return state.values.get(value)
    if isinstance(value, (list, tuple)):
        return tuple(_argument(state, entry) for entry in value)
    if isinstance(value, torch.dtype):
        return Reference("dtype", str(value).removeprefix("torch."))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _outputs(state: _Conversion, node: FxNode) -> tuple[str, ...]:
    names: list[str] = []
    results = node.args[0]
    assert isinstance(results, (list, tuple))
    inputs = state.program.graph_signature.user_inputs
    for spec, result in zip(state.program.graph_signature.output_specs, results, strict=True):
        value = state.values.get(result) if isinstance(result, FxNode) else None
        if spec.kind is OutputKind.USER_INPUT_MUTATION and spec.target in inputs:
            continue  # what the model leaves in its argument is no result of it
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise TraceError(f"the model has a side effect that is not supported: {spec.kind.name}")
        if result is None or isinstance(spec.arg, ConstantArgument):
            continue
        if not isinstance(value, Reference) or value.kind != "node":
            raise TraceError("an output of the model does not depend on its input")
        _, parts = _samples_at(state, result.meta.get("val"))
        if parts > 1:
            raise TraceError(
                f"an output has {parts} rows for every sample in its first dimension: samples must "
                "stay apart, so give it a dimension of their own"
            )
        names.append(value.name)
    if not names:
        raise TraceError("the model returns no tensor")
    return tuple(names)


def _validate(graph: Graph, computed: tuple[Node, ...], state: _Conversion) -> None:
    """Every node has a rule, depends on the input, and keeps the samples apart."""
    if not graph.inputs:
        raise TraceError("the model has no tensor input")
    require_rules(graph.nodes, without_bound(graph, computed))
    for node in graph.nodes:
        if node.name in state.problems:
            raise TraceError(f"{node.op} in module '{node.module}': {state.problems[node.name]}")
        if node.op not in SIZED and any(ref.kind == "batch" for ref in node.references()):
            raise TraceError(
                f"{node.op} in module '{node.module or '(root)'}' calculates with the number of "
                "samples: what a sample gives would depend on how many there are. Keep x.shape[0] "
                "out of the function (x.mean(...) and x.sum(...) over a sample's own dimensions)"
            )


def aliases_of(state_dict: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Name -> other names of the same tensor, from a state dict with `keep_vars=True`."""
    groups: dict[int, list[str]] = {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            groups.setdefault(id(value), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }


def exported_module(source: ExportedProgram | str | os.PathLike[str]) -> nn.Module:
    """The module of an exported program or a ``.pt2`` file.

    Raises:
        TraceError: the file cannot be read, or the program was exported in training mode.
    """
    program = source if isinstance(source, ExportedProgram) else _load(Path(source))
    _refuse_training(program)
    return program.module()

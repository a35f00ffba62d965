"""Exported programs as graphs of nodes, in which every op has a rule and samples stay apart."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import Node as FxNode

from lipfast.errors import TraceError, naming
from lipfast.graph.nodes import (
    Argument,
    Constant,
    Graph,
    Node,
    Reference,
    computed_name,
    value_name,
)
from lipfast.plan import canonical, export
from lipfast.plan.architecture import Architecture
from lipfast.plan.canonical import CHECKS, REPEATING, SIZED, Invocation
from lipfast.plan.compositions import by_their_rules
from lipfast.plan.computed import exact_value
from lipfast.plan.constant_folding import Folding, with_repetitions
from lipfast.plan.contractions import with_layers
from lipfast.plan.modules import aliases_of, shapes_of
from lipfast.plan.simplify import join_attention, join_products, simplify
from lipfast.plan.split import split_computed, without_bound
from lipfast.rules.registry import require_rules, rule_of, users_rules

# A tensor that is not in the state dict is kept in the plan up to this many entries.
MAX_CONSTANT_ENTRIES = 1 << 16
# What is calculated from such tensors is kept in their place up to this many.
MAX_FOLDED_ENTRIES = 4096


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
    folding: Folding = field(init=False)
    batch: Any = None
    dtypes: list[torch.dtype] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folding = Folding(lambda value: _samples_at(self, value))


def convert(
    program: ExportedProgram,
    state_dict: Mapping[str, Any],
    read: Mapping[str, Tensor] | None = None,
) -> Architecture:
    """The simplified graph of a program, with the names and shapes of a state dict.

    Args:
        program: in eval mode.
        state_dict: of the module that it is of.
        read: entries of it that conditions of the module rest on.

    Raises:
        TraceError, UnsupportedOpError: see `plan.trace.trace`.
    """
    export.refuse_training(program)
    program = export.without_in_place_ops(program)
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
            outputs = _output_names(state, node)
        elif node.op == "call_function":
            _add_call(state, node)
        else:
            state.nodes.append(Node(node.name, f"{node.op}.{node.target}"))
            state.values[node] = Reference("node", node.name)
    shapes = shapes_of(state_dict)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    graph = simplify(Graph(tuple(state.nodes), outputs), state.floating, ranks)
    graph = with_repetitions(graph, state.folding.axes, state.whole_shapes)
    graph = with_layers(graph, _static_shapes(state, shapes, graph))
    graph, computed = split_computed(graph, state.whole_shapes)
    if computed:
        ranks |= {computed_name(node.name): len(node.shape) for node in computed}
        graph = join_products(graph, ranks)
    graph = join_attention(graph)
    _validate(graph, computed, state)
    nodes = (*graph.nodes, *computed)
    used = {name for node in nodes for name in node.names("constant")}
    constants = {name: value for name, value in state.constants.items() if name in used}
    constants |= {
        value_name(name): Constant.from_tensor(value)
        for name, value in (read or {}).items()
        if name in shapes
    }
    return Architecture(
        graph,
        shapes,
        aliases_of(state_dict),
        constants,
        state.dtypes[0],
        computed,
        tuple(sorted(users_rules(nodes))),
    )


def _static_shapes(
    state: _Conversion, parameters: Mapping[str, tuple[int, ...]], graph: Graph
) -> dict[Reference, tuple[int, ...]]:
    """Shapes of what does not depend on the input; what is the same for all samples for one."""
    found = {Reference("parameter", name): shape for name, shape in parameters.items()}
    found |= {Reference("constant", name): c.shape for name, c in state.constants.items()}
    for node in graph.nodes:
        shape = state.whole_shapes.get(node.name.removesuffix("_once"))
        if shape is not None:
            found[Reference("node", node.name)] = shape
    return found


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
    if tensor.layout is not torch.strided:
        raise TraceError(
            f"constant '{name}' has layout {tensor.layout}: upper bounds take dense tensors only "
            "(tensor.to_dense()); jacobian_norms takes sparse ones, too"
        )
    if tensor.numel() > MAX_CONSTANT_ENTRIES:
        raise TraceError(
            f"constant '{name}' of shape {tuple(tensor.shape)} is not in the state dict and too "
            f"large for a plan (more than {MAX_CONSTANT_ENTRIES} entries): make it a persistent "
            "buffer, self.register_buffer(name, tensor), which the state dict holds"
        )
    if tensor.is_complex():
        raise TraceError(f"constant '{name}' is complex: only real networks are supported")
    try:
        state.constants[name] = Constant.from_tensor(tensor)
    except RuntimeError as error:  # of the kind that tensors of a trace raise when they are read
        raise TraceError(
            f"constant '{name}' of shape {tuple(tensor.shape)} has no value in the exported "
            "program: torch.export does not follow what it is made with (a derivative of "
            "torch.func or autograd inside forward?). Write the derivative out as a formula"
        ) from error


def _input(state: _Conversion, node: FxNode) -> None:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        state.values[node] = None
        return
    export.check_floating_input(value)
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
    state.folding.active.add(node.name)
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


def _add_call(state: _Conversion, node: FxNode) -> None:
    with naming(export.op_name(node.target), export.module_path(node)):
        _convert_call(state, node)


def _convert_call(state: _Conversion, node: FxNode) -> None:
    value = node.meta.get("val")
    multiple = _multiple(state, value)
    if multiple:
        state.values[node] = Reference("batch", "" if multiple == 1 else str(multiple))
        return
    op = export.op_name(node.target)
    if op in CHECKS:
        return
    args = tuple(_argument(state, entry) for entry in node.args)
    # Where a tensor lies does not matter to the function.
    kwargs = tuple(
        (key, _argument(state, entry))
        for key, entry in sorted(node.kwargs.items())
        if key not in ("device", "layout", "pin_memory", "memory_format")
    )
    if node.target is operator.getitem:
        op, args, kwargs = _entry(state, node) or (_entry_name(node), args, kwargs)
    call = Node(node.name, op, args, kwargs, module=export.module_path(node))
    result_rank = value.dim() if isinstance(value, Tensor) else 0
    call = canonical.from_the_front(call, canonical.rank_of_first_tensor(node), result_rank)
    position = rule_of(call.op).dtype_eps
    if position is not None and isinstance(value, Tensor):
        call = replace(call, args=_with_default_eps(call.args, position, value.dtype))
    call = state.folding.without_reading(call, node)
    if _became_constant(state, node, call):
        return
    folded = state.folding.folded(call, node)
    if isinstance(value, Tensor):
        state.floating[node.name] = value.dtype.is_floating_point
        if not value.dtype.is_floating_point:
            state.problems[node.name] = f"its result is of dtype {value.dtype}, not floating"
        if all(isinstance(size, int) for size in value.shape):
            state.whole_shapes[node.name] = tuple(value.shape)
        elif folded is not None:
            sizes = [size if isinstance(size, int) else 1 for size in value.shape]
            state.whole_shapes[node.name] = tuple(sizes)
    call = _beside_the_samples(state, node, call) if folded is None else folded
    known = _sample_shape(state, node.name, value) if node.name not in state.problems else None
    state.nodes.append(replace(call, shape=known or ()))
    state.values[node] = Reference("node", node.name)


def _beside_the_samples(state: _Conversion, node: FxNode, call: Node) -> Node:
    """The call with the samples in a dimension of their own; a noted problem if it has none."""
    operand = canonical.first_tensor(node)
    position, parts = _samples_at(state, None if operand is None else operand.meta.get("val"))
    if parts == 1:
        return call
    found = canonical.beside_the_samples(call, position)
    if found is None:
        state.problems[node.name] = (
            f"the samples and {parts} parts of each are one dimension, which this op may mix"
        )
    return call if found is None else found


def _with_default_eps(
    args: tuple[Argument, ...], position: int, dtype: torch.dtype
) -> tuple[Argument, ...]:
    """RMSNorm without an eps takes that of the dtype that it runs in: the dtype stands for it."""
    padded = (*args, *[None] * (position + 1 - len(args)))
    if padded[position] is not None:
        return padded
    return (*padded[:position], Reference("dtype", str(dtype).removeprefix("torch.")))


def _entry(state: _Conversion, node: FxNode) -> Invocation | None:
    """One entry of a tuple of results, as a call of its own."""
    source, index = node.args
    if not isinstance(source, FxNode) or not isinstance(index, int):
        return None
    args = [_argument(state, value) for value in source.args]
    return canonical.part(export.op_name(source.target), source, args, index)


def _entry_name(node: FxNode) -> str:
    """What an entry of a tuple of results is called, such as ``aten.max[1]``."""
    source, index = node.args
    made = export.op_name(source.target) if isinstance(source, FxNode) else "tuple"
    return f"{made}[{index}]"


def _became_constant(state: _Conversion, node: FxNode, call: Node) -> bool:
    """Evaluate what depends on constants only (ranges, masks, indices), if it is small and exact.

    Whatever rounds is left to the computed parameters, which carry a bound of their error.
    """
    value = node.meta.get("val")
    fixed = all(reference.kind in ("constant", "dtype") for reference in call.references())
    if not isinstance(value, Tensor) or value.is_complex() or not fixed:
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    sizes = [size for size in value.shape if isinstance(size, int)]
    if len(sizes) != value.dim() or math.prod(sizes) > MAX_FOLDED_ENTRIES:
        return False
    result = exact_value(call, state.constants)
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


def _output_names(state: _Conversion, node: FxNode) -> tuple[str, ...]:
    names: list[str] = []
    results = node.args[0]
    assert isinstance(results, (list, tuple))
    inputs = state.program.graph_signature.user_inputs
    for spec, result in zip(state.program.graph_signature.output_specs, results, strict=True):
        value = state.values.get(result) if isinstance(result, FxNode) else None
        if spec.kind is OutputKind.USER_INPUT_MUTATION and spec.target in inputs:
            continue  # what the model leaves in its argument is no result of it
        if spec.kind is not OutputKind.USER_OUTPUT:
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
                kind = spec.kind.name.partition("_")[0].lower()
                raise TraceError(
                    f"the model writes its {kind} '{spec.target}' in forward, even in eval mode: "
                    "then its outputs are no function of parameters and inputs that can be traced. "
                    "Write in training mode only (if self.training)"
                )
            raise TraceError(f"the model has a side effect that is not supported: {spec.kind.name}")
        if result is None or not isinstance(spec.arg, TensorArgument):
            continue  # a number: of samples, of entries
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
    require_rules(by_their_rules(graph), without_bound(graph, computed))
    for node in graph.nodes:
        if node.name in state.problems:
            raise TraceError(f"{node.op} in module '{node.module}': {state.problems[node.name]}")
        fixed = rule_of(node.op).batch is None and node.op not in SIZED | REPEATING.keys()
        if fixed and node.names("batch"):
            raise TraceError(
                f"{node.op} in module '{node.module or '(root)'}' calculates with the number of "
                "samples: what a sample gives would depend on how many there are. Keep x.shape[0] "
                "out of the function (x.mean(...) and x.sum(...) over a sample's own dimensions)"
            )

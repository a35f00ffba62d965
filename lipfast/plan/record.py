"""Which ATen calls a module makes: the same calls with other sizes need no second trace.

Tracing with `torch.export` takes tens of milliseconds, evaluating a small model well under one. An
archive with many widths of one architecture is traced once; for each further width the model is
evaluated once and what it called is compared. Anything that differs, a scalar argument included,
means a full trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lipfast.graph.nodes import Graph
from lipfast.plan.architecture import Architecture
from lipfast.plan.convert import MAX_FOLDED_ENTRIES
from lipfast.plan.interpret import walk
from lipfast.plan.modules import aliases_of, named_tensors, shapes_of

Record = tuple[Any, ...]
Traced = TypeVar("Traced", bound=Architecture)

# A call whose result is a Python number: what follows may depend on the data.
_DATA_DEPENDENT = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero")


_spelled = cache(str)  # what an op is called: torch makes it anew every time


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the calls below autograd, operands named by where they come from."""

    def __init__(self, names: Mapping[int, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = dict(names)
        self.alive: list[Any] = []  # an id names an object only while that object lives
        self.calls: list[Any] = []
        self.comparable = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _spelled(func)
        self.comparable &= not name.startswith(_DATA_DEPENDENT)
        named = self._name(tuple(sorted(kwargs.items()))) if kwargs else ()
        operands = self._name(tuple(args)), named
        self.calls.append((name, *operands))
        result = func(*args, **kwargs)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and id(value) not in self.names:
                self.names[id(value)] = ("value", len(self.alive))
                self.alive.append(value)
        return result

    def _name(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._name(entry) for entry in value)
        if not isinstance(value, Tensor):
            self.comparable &= not isinstance(value, torch.SymInt)
            return (type(value).__name__, repr(value))
        if id(value) not in self.names:
            self._name_constant(value)
        return self.names[id(value)]

    def _name_constant(self, value: Tensor) -> None:
        """A tensor that is neither in the state dict nor a result is known by its content."""
        self.alive.append(value)
        if value.numel() > MAX_FOLDED_ENTRIES:
            self.comparable = False
            self.names[id(value)] = ("constant",)
        else:
            content = repr(value.flatten().tolist())
            self.names[id(value)] = ("constant", str(value.dtype), tuple(value.shape), content)


def record(
    module: nn.Module, inputs: Sequence[Tensor], state_dict: Mapping[str, Any] | None = None
) -> Record | None:
    """Evaluate a module once and list what it called.

    Two modules with equal records apply the same ATen ops with the same scalar arguments to the
    same entries of the state dict and equal constants in the same order; only the shapes of the
    entries may differ. So a plan of one is, with the other's shapes, a plan of the other.

    Args:
        module: in eval mode.
        inputs: example inputs.
        state_dict: ``module.state_dict(keep_vars=True)``, if it is there already.

    Returns:
        A hashable record, or None where calls do not tell (data-dependent control flow, large
        constants, no calls at all).
    """
    if state_dict is None:
        state_dict = module.state_dict(keep_vars=True)
    # Only these go by name: a plan holds the values of all other tensors (of buffers that are not
    # persistent, for instance), so two modules that differ in one of those need a plan each.
    names: dict[int, Any] = {}
    for name, value in named_tensors(state_dict).items():
        names.setdefault(id(value), ("parameter", name))
    names.update({id(value): ("input", index) for index, value in enumerate(inputs)})
    recorder = _Recorder(names)
    with torch.no_grad(), recorder:
        outputs = module(*inputs)
    if not recorder.comparable or not recorder.calls:
        return None
    leaves, structure = torch.utils._pytree.tree_flatten(outputs)
    known = recorder.names
    results = tuple(known[id(leaf)] if id(leaf) in known else repr(leaf) for leaf in leaves)
    modules = tuple((name, type(child)) for name, child in module.named_modules())
    samples = tuple((tuple(value.shape), value.dtype) for value in inputs)
    aliases = tuple(sorted(aliases_of(state_dict).items()))
    calls = tuple(recorder.calls)
    return (modules, tuple(state_dict), aliases, samples, calls, results, repr(structure))


def resized(plan: Traced, module: nn.Module) -> Traced | None:
    """The plan of a module whose record equals that of the module that `plan` was traced from.

    None where weights are computed from parameters: their shapes take a trace.

    Args:
        plan: a traced architecture, or a plan of one.
        module: the same architecture with parameters of other shapes.

    Returns:
        The plan with the module's shapes, as tracing the module would give it.
    """
    if plan.computed:
        return None
    shapes = shapes_of(module.state_dict())
    meta = torch.device("meta")
    parameters = {
        name: torch.empty((1, *shapes[name]), dtype=plan.dtype, device=meta)
        for name in plan.used_parameters
    }
    inputs = [
        torch.empty((1, 2, *shape), dtype=plan.dtype, device=meta) for shape in plan.input_shapes
    ]
    with torch.no_grad():
        values = walk(plan.graph, parameters, plan.constants, inputs, keep=True)
    nodes = tuple(
        replace(node, shape=tuple(values[node.name].shape[2:])) for node in plan.graph.nodes
    )
    return replace(plan, graph=Graph(nodes, plan.graph.outputs), parameters=shapes)

"""Tensors that a model computes from its parameters: weight norm, masks, tables of positions.

They are evaluated once per state dict, in float64, and count as parameters from then on. What is
rounded carries an elementwise bound of its error: the value in real arithmetic is within it.
Integers and moved entries are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError, TraceError
from lipfast.plan import matrix_errors, running_errors  # noqa: F401 (both register functions)
from lipfast.plan.apply import call_op
from lipfast.plan.graph import Argument, Constant, Node, Reference, computed_name, error_name
from lipfast.plan.running_errors import Value

# The result holds entries of the operands, or numbers that the op puts in: nothing is rounded.
MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("_unsafe_view", "as_strided", "broadcast_to", "cat", "chunk", "clone", "constant_pad_nd"),
        *("contiguous", "detach", "diag", "diagonal", "expand", "flatten", "flip", "index"),
        *("index_select", "mH", "mT", "movedim", "narrow", "numpy_T", "pad", "permute", "repeat"),
        *(
            "repeat_interleave",
            "reshape",
            "roll",
            "select",
            "slice",
            "squeeze",
            "stack",
            "swapaxes",
        ),
        *("t", "transpose", "tril", "triu", "unflatten", "unsqueeze", "view"),
    )
)
# Exact, if the operands are: comparisons, integers, and what overwrites entries.
_EXACT_ON_EXACT = frozenset(
    f"aten.{name}"
    for name in (
        *("arange", "bitwise_and", "bitwise_not", "bitwise_or", "diag_embed", "empty", "eq", "eye"),
        *("fill", "floor_divide", "full", "full_like", "ge", "gt", "le", "linspace", "logical_and"),
        *("logical_not", "logical_or", "lt", "masked_fill", "meshgrid", "ne", "new_full"),
        *("new_ones", "new_zeros", "ones", "ones_like", "remainder", "scalar_tensor", "sign"),
        *("slice_scatter", "select_scatter", "where", "zeros", "zeros_like", "copy", "index_put"),
    )
)
_CASTS = frozenset({"aten.to", "aten._to_copy", "aten.type_as", "aten.lift_fresh_copy"})


def known(op: str) -> bool:
    """Whether an op on parameters can be evaluated with its rounding errors."""
    return op in MOVES or op in _EXACT_ON_EXACT or op in _CASTS or op in running_errors.RULES


def rounded(nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the computed nodes whose values carry rounding errors."""
    found: set[str] = set()
    for node in nodes:
        inherited = any(ref.kind == "node" and ref.name in found for ref in node.references())
        if node.op in running_errors.RULES or (inherited and node.op not in _EXACT_ON_EXACT):
            found.add(node.name)
    return frozenset(found)


@dataclass
class _Evaluation:
    """Values so far, and where the other operands come from."""

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    values: dict[str, Value]

    def value(self, reference: Reference) -> Value:
        if reference.kind == "node":
            return self.values[reference.name]
        if reference.kind == "constant":
            return Value(_wide(self.constants[reference.name].tensor()))
        error = self.tensors.get(error_name(reference.name))
        return Value(_wide(self.tensors[reference.name].detach()), error)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype.is_floating_point else tensor


def evaluate_computed(
    nodes: Sequence[Node],
    tensors: Mapping[str, Tensor],
    constants: Mapping[str, Constant],
    where: str = "",
) -> dict[str, Tensor]:
    """Values of computed nodes, and bounds of their rounding errors.

    Args:
        nodes: in topological order; they refer to each other, to parameters and to constants.
        tensors: a resolved state dict; perhaps with computed parameters and `error_name` of them.
        constants: of the plan.
        where: prefix for messages.

    Returns:
        For each node a float64 (or integer) tensor under `computed_name`, and under `error_name`
        of that a tensor of the same shape where the op rounds.

    Raises:
        NonFiniteError: a value is not finite although the parameters are; names the module.
        TraceError: an op that needs exact operands got rounded ones.
    """
    state, found = _Evaluation(tensors, constants, {}), {}
    inexact = rounded(nodes)
    for node in nodes:
        value = _evaluate(node, state)
        state.values[node.name] = value
        name = computed_name(node.name)
        finite = value.error is None or bool(torch.isfinite(value.error).all())
        # Masks hold -inf on purpose.
        if node.name in inexact and not (finite and bool(torch.isfinite(value.tensor).all())):
            raise NonFiniteError(
                f"{where}{node.op} in module '{node.module}', which computes a weight from "
                "parameters, gives numbers that are not finite, or that rounding may make so"
            )
        found[name] = value.tensor
        if node.name in inexact:
            error = value.error
            found[error_name(name)] = torch.zeros_like(value.tensor) if error is None else error
    return found


def _evaluate(node: Node, state: _Evaluation) -> Value:
    rule = running_errors.RULES.get(node.op)
    if rule is not None:
        operands = [_operand(argument, state) for argument in node.args]
        return rule(operands, dict(node.kwargs))
    operand_errors = [state.value(ref).error for ref in node.references() if ref.kind != "dtype"]
    exact = all(error is None or not bool(error.any()) for error in operand_errors)
    if node.op in _CASTS:
        return _cast(node, state, exact=exact)
    value = _wide(_call(node, lambda ref: state.value(ref).tensor))
    if exact:
        return Value(value)
    if node.op in _EXACT_ON_EXACT:
        raise TraceError(
            f"{node.op} in module '{node.module}' is applied to a tensor that is computed from "
            "parameters with rounding errors: there is no bound of its error"
        )
    return Value(value, _call(node, lambda ref: _error_of(state.value(ref))).abs())


def _error_of(value: Value) -> Tensor:
    if value.error is not None:
        return value.error
    return torch.zeros_like(value.tensor) if value.tensor.is_floating_point() else value.tensor


def _call(node: Node, tensor: Callable[[Reference], Tensor]) -> Tensor:
    """The op in float64: what it makes of numbers of the model's own dtype is not rounded."""
    kwargs = tuple((key, _in_double(value)) for key, value in node.kwargs if key != "memory_format")
    wide = replace(node, args=tuple(_in_double(value) for value in node.args), kwargs=kwargs)
    return call_op(wide, tensor, 1)


def _in_double(value: Argument) -> Argument:
    if isinstance(value, Reference) and value.kind == "dtype":
        floating = getattr(torch, value.name).is_floating_point
        return Reference("dtype", "float64") if floating else value
    return value


def _cast(node: Node, state: _Evaluation, *, exact: bool) -> Value:
    """Between floating dtypes the identity; to integers only what is exact."""
    first = next(ref for ref in node.references() if ref.kind != "dtype")
    value = state.value(first)
    if value.tensor.is_floating_point():
        result = _call(node, lambda ref: state.value(ref).tensor)
        if result.is_floating_point():
            return value
        if not exact:
            raise TraceError(
                f"{node.op} in module '{node.module}' rounds a computed weight to integers"
            )
        return Value(result)
    return Value(_wide(_call(node, lambda ref: state.value(ref).tensor)))


def _operand(argument: Argument, state: _Evaluation) -> object:
    if isinstance(argument, Reference):
        if argument.kind == "dtype":
            return None
        return state.value(argument)
    if isinstance(argument, tuple):
        return tuple(_operand(entry, state) for entry in argument)
    return argument

"""Tensors that a model computes from its parameters: weight norm, masks, tables of positions.

They are evaluated once per state dict, in float64, and count as parameters from then on. What is
rounded carries an elementwise bound of its error: the value in real arithmetic is within it.
Moved entries are exact, and so are integers and truth values, which are what torch makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError, TraceError, naming
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Constant, Node, Reference, computed_name, error_name
from lipfast.ops.fetched import sent
from lipfast.plan import elementwise_errors, matrix_errors, product_errors  # noqa: F401 (registered)
from lipfast.plan.canonical import CASTS
from lipfast.plan.parameter_rules import PARAMETER_RULES, Enclosure, beyond_rule, bind
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import device_of
from lipfast.rules.registry import rule_of

_Result = TypeVar("_Result")

# Ops on parameters, by what happens to rounding errors. Ops with a bound of those they make are
# in `parameter_rules`; of ops that activations may meet, too, `Rule.moves` says what these say.

# The result holds entries of the operands, or numbers that the op puts in: nothing is rounded.
_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        *("alias", "as_strided", "broadcast_to", "chunk", "clone", "contiguous", "detach"),
        *("detach_", "diag", "diagonal", "lift_fresh", "mH", "mT", "movedim", "narrow", "numpy_T"),
        *("positive", "swapaxes", "t", "tril", "triu", "embedding"),
        *("gather", "take_along_dim"),
    )
)
# Exact, if the operands are: comparisons, integers, and what overwrites entries.
_EXACT_ON_EXACT = frozenset(
    f"aten.{name}"
    for name in (
        *("bitwise_and", "bitwise_not", "bitwise_or", "ceil", "diag_embed", "empty", "eq", "eye"),
        *("fill", "floor", "full", "full_like", "ge", "gt", "le", "logical_and"),
        *("logical_not", "logical_or", "lt", "meshgrid", "ne", "new_full"),
        *("new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor", "sign"),
        *("slice_scatter", "select_scatter", "zeros", "zeros_like", "copy", "index_put"),
    )
)
# Of integers, and with integers as a result; of other numbers they round or jump.
_ON_INTEGERS = frozenset(f"aten.{name}" for name in ("floor_divide", "bitwise_xor"))
_CASTS = CASTS | {"aten.lift_fresh_copy"}


def moves(op: str) -> bool:
    """Whether an op only moves entries, and errors alike."""
    return op in _MOVES or rule_of(op).moves


def refusal(node: Node) -> str | None:
    """Why an op on parameters cannot be evaluated with its rounding errors; None if it can."""
    if node.names("batch"):
        return "of parameters and the number of samples"
    if node.op in PARAMETER_RULES:
        return beyond_rule(node)
    if node.op == "aten.index_put" and node.argument(3, "accumulate") is True:
        return "with sums"
    known = moves(node.op) or node.op in _EXACT_ON_EXACT or node.op in _CASTS
    return None if known or node.op in _ON_INTEGERS else "applied to parameters only"


def rounded(nodes: Iterable[Node]) -> frozenset[str]:
    """Names of the computed nodes whose values may carry rounding errors."""
    found: set[str] = set()
    for node in nodes:
        inherited = not found.isdisjoint(node.names("node"))
        exact = node.op in _EXACT_ON_EXACT or node.op in _ON_INTEGERS
        if node.op in PARAMETER_RULES or (inherited and not exact):
            found.add(node.name)
    return frozenset(found)


def exact_value(node: Node, constants: Mapping[str, Constant]) -> Tensor | None:
    """What an op makes of constants, if nothing is rounded and nothing is beyond the rules."""
    state = _Evaluation({}, constants, {})
    try:
        with naming(node.op, node.module):
            integers = _of_integers(node, state)
        if integers is not None:
            return integers
        if refusal(node) is not None:
            return None
        value = _evaluated(node, state)
    except TraceError:
        return None
    inexact = value.error is not None and bool(value.error.any())
    return None if inexact or bool(value.tensor.isnan().any()) else value.tensor


@dataclass
class _Evaluation:
    """Values so far, and where the other operands come from."""

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    values: dict[str, Enclosure]
    # Of many networks at once: what has to hold, and has been taken to hold without a look.
    assumed: list[Tensor] | None = None

    def are_exact(self, values: Sequence[Enclosure]) -> bool:
        """Whether none of them has an error that is not zero."""
        errors = [value.error for value in values if value.error is not None]
        if self.assumed is None:
            return not any(bool(error.any()) for error in errors)
        self.assumed.extend(~error.any() for error in errors)
        return True

    def value(self, reference: Reference) -> Enclosure:
        if reference.kind == "node":
            return self.values[reference.name]
        if reference.kind == "constant":
            constant = self.constants[reference.name].tensor()
            return Enclosure(sent(_as_double(constant), device_of(self.tensors)))
        error = self.tensors.get(error_name(reference.name))
        return Enclosure(_as_double(self.tensors[reference.name].detach()), error)


def _as_double(tensor: Tensor) -> Tensor:
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
        value = _evaluated(node, state)
        state.values[node.name] = value
        name = computed_name(node.name)
        if node.name in inexact and not bool(_sure(value)):
            raise NonFiniteError(
                f"{where}{node.op} in module '{node.module}', which computes a weight from "
                "parameters, gives numbers that are not finite, or that rounding may make so"
            )
        found[name] = value.tensor
        if node.name in inexact:
            found[error_name(name)] = value.radius
    return found


def evaluate_many(
    nodes: Sequence[Node],
    tensors: Mapping[str, Tensor],
    constants: Mapping[str, Constant],
) -> tuple[dict[str, Tensor], Tensor]:
    """`evaluate_computed` for `torch.func.vmap`: nothing looks at a number.

    Also returns whether all values are what `evaluate_computed` would give: finite, and those
    exact that have to be. A rule that looks at numbers makes vmap raise.
    """
    state, found = _Evaluation(tensors, constants, {}, []), {}
    inexact, assumed = rounded(nodes), state.assumed
    assert assumed is not None
    for node in nodes:
        value = state.values[node.name] = _evaluated(node, state)
        name = computed_name(node.name)
        found[name] = value.tensor
        if node.name in inexact:
            assumed.append(_sure(value))
            found[error_name(name)] = value.radius
    fine = torch.ones((), dtype=torch.bool, device=device_of(tensors))
    for own in assumed:
        fine = fine & own
    return found, fine


def evaluate_together(
    nodes: Sequence[Node], networks: ResolvedNetworks, constants: Mapping[str, Constant]
) -> tuple[dict[str, Tensor], Tensor] | None:
    """`evaluate_computed` of many networks: (N, *shape) each, and for each whether it is right.

    None where a rule looks at numbers, so that networks have to be evaluated one by one.
    """

    def evaluate(entry: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        return evaluate_many(nodes, entry, constants)

    names = parameters_read(nodes)
    # Where nothing is read, any tensor says where numbers are to be.
    return mapped(evaluate, networks.tensors(names) or networks.tensors(list(networks[0])[:1]))


def parameters_read(nodes: Iterable[Node]) -> list[str]:
    """Names of the parameters that computed nodes read, and of the bounds of their errors."""
    names = dict.fromkeys(name for node in nodes for name in node.names("parameter"))
    return [*names, *map(error_name, names)]


def mapped(function: Callable[..., _Result], entries: Mapping[str, Tensor]) -> _Result | None:
    """A function of one network's tensors, of all networks at once; None where it looks at one."""
    if not entries:
        return None
    try:
        return torch.func.vmap(function)(dict(entries))
    except (RuntimeError, ValueError, TraceError):  # what is wrong shows in the evaluation of each
        return None


def _sure(value: Enclosure) -> Tensor:
    """Whether every entry is a number near the truth; masks hold -inf on purpose."""
    if value.error is None:
        return ~value.tensor.isnan().any()
    meant = torch.isinf(value.tensor) & (value.error == 0)
    return (torch.isfinite(value.error) & (torch.isfinite(value.tensor) | meant)).all()


def _evaluated(node: Node, state: _Evaluation) -> Enclosure:
    with naming(node.op, node.module):
        value = _value_of(node, state)
    if any(reference.kind != "dtype" for reference in node.references()):
        return value
    # What reads no tensor was made on the CPU.
    return value.rearranged(lambda made: sent(made, device_of(state.tensors)))


def _value_of(node: Node, state: _Evaluation) -> Enclosure:
    integers = _of_integers(node, state)
    if integers is not None:
        return Enclosure(integers)
    rule = PARAMETER_RULES.get(node.op)
    if rule is not None:
        bound = bind(node)
        args = [_operand(argument, state) for argument in bound.args]
        kwargs = {key: _operand(entry, state) for key, entry in bound.kwargs.items()}
        evaluate = rule.evaluate if state.assumed is None else rule.together or rule.evaluate
        return evaluate(*args, **kwargs)
    if node.op in _CASTS:
        return _cast(node, state)
    operands = _operand_values(node, state)
    value = _as_double(_called(node, lambda ref: state.value(ref).tensor))
    # Moved errors are right whether or not they are zero: many networks need no look at them.
    moved = state.assumed is not None and node.op not in _EXACT_ON_EXACT | _ON_INTEGERS
    exact = all(entry.error is None for entry in operands) if moved else state.are_exact(operands)
    if exact and (node.op not in _ON_INTEGERS or not value.is_floating_point()):
        return Enclosure(value)
    if node.op in _EXACT_ON_EXACT or node.op in _ON_INTEGERS:
        raise TraceError(
            f"{node.op} in module '{node.module}' is applied to a tensor that is computed from "
            "parameters with rounding errors, or to one that is not of integers: there is no bound "
            "of its error"
        )
    filled = rule_of(node.op).fills or ()  # a number there has no error
    entries = tuple(
        0.0 if index in filled and isinstance(argument, (int, float)) else argument
        for index, argument in enumerate(node.args)
    )
    node = replace(node, args=entries)
    return Enclosure(value, _called(node, lambda ref: _error_of(state.value(ref))).abs())


def _operand_values(node: Node, state: _Evaluation) -> list[Enclosure]:
    return [state.value(ref) for ref in node.references() if ref.kind != "dtype"]


def _of_integers(node: Node, state: _Evaluation) -> Tensor | None:
    """The result of an op on integers or truth values, if it is of them too."""
    floating = any(value.tensor.is_floating_point() for value in _operand_values(node, state))
    if floating or not node.op.startswith("aten."):
        return None
    result = _called(node, lambda ref: state.value(ref).tensor)
    return None if result.is_floating_point() else result


def _error_of(value: Enclosure) -> Tensor:
    if value.error is not None:
        return value.error
    return torch.zeros_like(value.tensor) if value.tensor.is_floating_point() else value.tensor


def _called(node: Node, tensor: Callable[[Reference], Tensor]) -> Tensor:
    """The op in float64: what it makes of numbers of the model's own dtype is not rounded."""
    kwargs = tuple((key, value) for key, value in node.kwargs if key != "memory_format")
    return call_op(replace(node, kwargs=kwargs), tensor, 1, double=True)


def _cast(node: Node, state: _Evaluation) -> Enclosure:
    """Between floating dtypes the identity; to integers only what is exact."""
    first = next(ref for ref in node.references() if ref.kind != "dtype")
    value = state.value(first)
    result = _called(node, lambda ref: state.value(ref).tensor)
    if not value.tensor.is_floating_point():
        return Enclosure(_as_double(result))
    if result.is_floating_point():
        return value
    if not state.are_exact(_operand_values(node, state)):
        raise TraceError(
            f"{node.op} in module '{node.module}' rounds a computed weight to integers"
        )
    return Enclosure(result)


def _operand(argument: Argument, state: _Evaluation) -> object:
    if isinstance(argument, Reference):
        return None if argument.kind == "dtype" else state.value(argument)
    if isinstance(argument, tuple):
        return tuple(_operand(entry, state) for entry in argument)
    return argument

"""What export writes in several ways, in one: dimensions counted from the front, parts as slices.

Rules can then see which dimension is the samples (0), whatever the rank of an operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor
from torch.fx import Node as FxNode

from lipfast.graph.nodes import Argument, Node, is_floating_dtype
from lipfast.rules.registry import RULES, Dimensions, rule_of

# Ops that have no rule: other spellings of ops that have one, and what is no function of samples.
# Nothing here is knowledge of a bound; of an op with a rule all that is known is in its `Rule`.

# Identities for every argument that they are traced with (dropout: training mode is refused
# before). `detach` stops gradients, not the function.
IDENTITIES = frozenset(
    f"aten.{name}"
    for name in (
        *("alias", "alpha_dropout", "clone", "contiguous", "detach", "detach_", "dropout"),
        *("feature_alpha_dropout", "feature_dropout", "lift_fresh", "lift_fresh_copy", "positive"),
    )
)
# Identities as long as the result is a floating tensor.
CASTS = frozenset({"aten.to", "aten._to_copy", "aten.type_as"})
# Position of the flag that says "training".
TRAINING_FLAGS = {
    "aten.dropout": 2,
    "aten.alpha_dropout": 2,
    "aten.feature_dropout": 2,
    "aten.feature_alpha_dropout": 2,
    "aten.native_dropout": 2,
    "aten.native_batch_norm": 5,
    "aten._native_batch_norm_legit": 5,
}
# They have no result.
CHECKS = frozenset(
    f"aten.{name}"
    for name in (
        *("_assert_tensor_metadata", "_assert_async", "_assert_scalar"),
        *("sym_constrain_range", "sym_constrain_range_for_size"),
    )
)
# Other names of ops.
_SYNONYMS = {"aten.clip": "aten.clamp"}
# Constants that take nothing but their dtype from the first operand.
_MADE_LIKE = {
    "aten.new_zeros": "aten.zeros",
    "aten.new_ones": "aten.ones",
    "aten.new_full": "aten.full",
}
# Position of the sizes, in front of which the number of samples may stand.
REPEATING = {"aten.full": 0, "aten.ones": 0, "aten.zeros": 0, "aten.broadcast_to": 1}
# These take the number of samples as a size, too.
SIZED = frozenset({"aten.narrow", "aten.new_zeros"})
TRANSPOSES = frozenset({"aten.t", "aten.numpy_T"})
# The last two dimensions change places (all numbers here are real).
_TURNING = frozenset({"aten.mH", "aten.mT"})
_PARTS = frozenset({"aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind"})

# Name, positional and keyword arguments of an op.
Invocation = tuple[str, tuple[Argument, ...], tuple[tuple[str, Argument], ...]]


def from_the_front(call: Node, rank: int, result_rank: int) -> Node:
    """The call with non-negative dimensions and without casts.

    Args:
        call: of an ATen op.
        rank: of the first tensor operand.
        result_rank: of the result.
    """
    call = replace(call, op=_SYNONYMS.get(call.op, call.op))
    op, args, kwargs = call.op, call.args, call.kwargs
    if op in _TURNING and rank >= 2:
        turned = (args[0], rank - 2, rank - 1)
        return replace(call, op="aten.transpose", args=turned, kwargs=())
    if op in _MADE_LIKE:
        kept = tuple((key, entry) for key, entry in kwargs if key != "dtype")
        return replace(call, op=_MADE_LIKE[op], args=args[1:], kwargs=kept)
    rule = rule_of(op)
    if rule.casts:
        args = tuple(None if is_floating_dtype(value) else value for value in args)
        kwargs = tuple((key, value) for key, value in kwargs if not is_floating_dtype(value))
    dimensions = rule.dimensions or Dimensions({})
    if dimensions.default is not None and len(args) < 2 and "dim" not in dict(kwargs):
        args = (*args, dimensions.default)
    count = result_rank if dimensions.of_result else rank
    plain = replace(call, args=args, kwargs=kwargs)
    return _renumbered(plain, dimensions, lambda value: _positive(value, count))


def _renumbered(call: Node, dimensions: Dimensions, change: Callable[[Argument], Argument]) -> Node:
    """The call, the arguments that name dimensions changed."""
    table, names = dimensions.names, set(dimensions.names.values())
    args = tuple(change(v) if index in table else v for index, v in enumerate(call.args))
    kwargs = tuple((key, change(v) if key in names else v) for key, v in call.kwargs)
    return replace(call, args=args, kwargs=kwargs)


def _positive(value: Argument, rank: int) -> Argument:
    if isinstance(value, tuple):
        return tuple(_positive(entry, rank) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        return value + rank
    return value


def beside_the_samples(call: Node, position: int) -> Node | None:
    """The call on ``(samples, parts, ...)`` instead of ``(samples * parts, ...)``.

    Args:
        call: with non-negative dimensions.
        position: the dimension of the first operand that holds samples and parts.

    Returns:
        The call with the dimensions counted anew; None where the op may mix samples and parts.
    """
    rule = rule_of(call.op)
    if rule.reshapes:
        return call  # what it makes of a sample follows from the shapes alone
    if not rule.leading:
        return None
    if call.op == "aten.bmm":  # takes three dimensions only
        call = replace(call, op="aten.matmul")
    dimensions = rule.dimensions or Dimensions({})
    touched: set[Argument] = set()

    def recounted(value: Argument) -> Argument:
        touched.update(value if isinstance(value, tuple) else (value,))
        return _recounted(value, position, whole=dimensions.order)

    moved = _renumbered(call, dimensions, recounted)
    return None if position in touched and not dimensions.order else moved


def _recounted(value: Argument, position: int, *, whole: bool) -> Argument:
    """Dimensions after one of them became two; an order of all of them (`whole`) names both."""
    if isinstance(value, tuple):
        entries: list[Argument] = []
        for entry in value:
            entries.append(_recounted(entry, position, whole=False))
            if whole and entry == position:
                entries.append(position + 1)
        return tuple(entries)
    if isinstance(value, int) and not isinstance(value, bool) and value > position:
        return value + 1
    return value


def part(op: str, source: FxNode, args: Sequence[Argument], index: int) -> Invocation | None:
    """The call that gives one entry of a tuple of results, or None if no rule could know it.

    Pieces of `chunk` and `split` become slices; a slice is cut off at the end of the tensor, so
    it stays right when the same graph is used for another width.
    """
    if op not in _PARTS:
        return _values(op, source, args) if index == 0 else None
    values = source.meta.get("val")
    operand = source.args[0]
    if not isinstance(operand, FxNode) or values is None:
        return None
    shape = operand.meta["val"].shape
    given = dict(zip(("_", "second", "third"), args, strict=False)) | dict(_kwargs(source))
    if op == "aten.unbind":
        dim = given.get("dim", given.get("second", 0))
        assert isinstance(dim, int)
        return "aten.select", (args[0], dim % len(shape), index % len(values)), ()
    dim = given.get("dim", given.get("third", 0))
    assert isinstance(dim, int)
    dim %= len(shape)
    index %= len(values)
    start, length = _piece(op, given, shape[dim], index, len(values))
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return "aten.slice", (args[0], dim, start, start + length), ()


def _values(op: str, source: FxNode, args: Sequence[Argument]) -> Invocation | None:
    """The call for the first result; models with in-place operations come decomposed."""
    if op == "aten._native_batch_norm_legit_no_training":
        # (x, weight, bias, mean, variance, momentum, eps)
        return "aten.batch_norm", (*args[:5], False, args[5], args[6], False), ()
    if op == "aten.native_layer_norm":
        return "aten.layer_norm", tuple(args), ()
    return (op, tuple(args), _kwargs(source)) if op in RULES else None


def _piece(
    op: str, given: dict[str, Argument], size: object, index: int, count: int
) -> tuple[object, object]:
    """First entry and length of a piece, before it is cut off at the end."""
    if op == "aten.chunk":
        chunks = given.get("chunks", given.get("second"))
        if not isinstance(size, int) or not isinstance(chunks, int):
            return None, None
        length: Argument = math.ceil(size / chunks)
    else:
        length = given.get("split_size", given.get("split_sizes", given.get("second")))
    if isinstance(length, tuple):
        lengths = [entry for entry in length if isinstance(entry, int)]
        return (sum(lengths[:index]), lengths[index]) if len(lengths) == count else (None, None)
    return (length * index, length) if isinstance(length, int) else (None, None)


def _kwargs(node: FxNode) -> tuple[tuple[str, Argument], ...]:
    return tuple(
        (key, value)
        for key, value in sorted(node.kwargs.items())
        if isinstance(value, (int, float, str))
    )


def first_tensor(node: FxNode) -> FxNode | None:
    """The first operand that is a tensor."""
    for value in node.args:
        entry = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(entry, FxNode):
            result = entry.meta.get("val")
            if isinstance(result, Tensor):
                return entry
            if isinstance(result, (list, tuple)):  # `node` takes one entry of a tuple of results
                return first_tensor(entry)
    return None


def rank_of_first_tensor(node: FxNode) -> int:
    """Number of dimensions of the first operand that is a tensor."""
    found = first_tensor(node)
    return 0 if found is None else int(found.meta["val"].dim())

"""What export writes in several ways, in one: dimensions counted from the front, parts as slices.

Rules can then see which dimension is the samples (0), whatever the rank of an operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node as FxNode

from lipfast.graph.nodes import Argument, Reference
from lipfast.rules.pointwise import POINTWISE

# Arguments that name dimensions of the first operand, by position.
_DIMENSIONS: dict[str, dict[int, str]] = {
    "aten.amax": {1: "dim"},
    "aten.amin": {1: "dim"},
    "aten.cat": {1: "dim"},
    "aten.flip": {1: "dims"},
    "aten.glu": {1: "dim"},
    "aten.linalg_vector_norm": {2: "dim"},
    "aten.log_softmax": {1: "dim"},
    "aten.logsumexp": {1: "dim"},
    "aten.max": {1: "dim"},
    "aten.mean": {1: "dim"},
    "aten.min": {1: "dim"},
    "aten.permute": {1: "dims"},
    "aten.roll": {2: "dims"},
    "aten.select": {1: "dim"},
    "aten.slice": {1: "dim"},
    "aten.softmax": {1: "dim"},
    "aten.sum": {1: "dim"},
    "aten.transpose": {1: "dim0", 2: "dim1"},
    "aten.unfold": {1: "dimension"},
}
# The dimension counts those of the result.
_RESULT_DIMENSIONS = {"aten.stack": {1: "dim"}}
# May cast first; between floating types a cast is an identity.
_CASTING = frozenset({"aten.log_softmax", "aten.mean", "aten.softmax", "aten.sum"})
# The last two dimensions change places (all numbers here are real).
_TURNING = frozenset({"aten.mH", "aten.mT"})
# Left out, these mean dimension 0.
_DEFAULT_ZERO = frozenset({"aten.cat", "aten.stack"})

# Ops that treat every entry of the leading dimensions alike, or dimensions that their arguments
# name: one dimension more in front changes nothing else.
_ALIKE = frozenset(
    {
        "aten.add",
        "aten.bmm",
        "aten.contiguous",
        "aten.clone",
        "aten.constant_pad_nd",
        "aten.detach",
        "aten.div",
        "aten.dropout",
        "aten.layer_norm",
        "aten.linear",
        "aten.matmul",
        "aten.maximum",
        "aten.minimum",
        "aten.mul",
        "aten.pad",
        "aten.rms_norm",
        "aten.rsub",
        "aten.scaled_dot_product_attention",
        "aten.sub",
        "aten.to",
        "aten._to_copy",
    }
)
# What these make of a sample follows from the shapes alone.
_RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"),
    )
)
# Their rules are for images: a dimension in front of the channels is not one of a sample's.
_NAMED_ONLY = frozenset({"aten.glu", "aten.unfold"})
_PARTS = frozenset({"aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind"})
# Of these results only the first, the values, has a rule; the second are indices.
_VALUES_FIRST = frozenset(
    {
        "aten._native_batch_norm_legit_no_training",
        "aten.native_layer_norm",
        "aten.adaptive_max_pool1d",
        "aten.adaptive_max_pool2d",
        "aten.adaptive_max_pool3d",
        "aten.max",
        "aten.max_pool2d_with_indices",
        "aten.max_pool3d_with_indices",
        "aten.min",
    }
)
Call = tuple[str, tuple[Argument, ...], tuple[tuple[str, Argument], ...]]


def from_the_front(
    op: str,
    args: tuple[Argument, ...],
    kwargs: tuple[tuple[str, Argument], ...],
    rank: int,
    result_rank: int,
) -> Call:
    """The call with non-negative dimensions and without casts.

    Args:
        op: ATen op.
        args: positional arguments.
        kwargs: keyword arguments.
        rank: of the first tensor operand.
        result_rank: of the result.

    Returns:
        op, args, kwargs.
    """
    if op in _TURNING and rank >= 2:
        return "aten.transpose", (args[0], rank - 2, rank - 1), ()
    if op in _CASTING:
        args = tuple(None if _is_dtype(value) else value for value in args)
        kwargs = tuple((key, value) for key, value in kwargs if not _is_dtype(value))
    table = _DIMENSIONS.get(op) or _RESULT_DIMENSIONS.get(op)
    if table is None:
        return op, args, kwargs
    count = result_rank if op in _RESULT_DIMENSIONS else rank
    if op in _DEFAULT_ZERO and len(args) < 2 and "dim" not in dict(kwargs):
        args = (*args, 0)
    names = set(table.values())
    positional = tuple(
        _positive(value, count) if position in table else value
        for position, value in enumerate(args)
    )
    named = tuple(
        (key, _positive(value, count) if key in names else value) for key, value in kwargs
    )
    return op, positional, named


def _is_dtype(value: Argument) -> bool:
    """Of a cast that is an identity: between floating dtypes."""
    if not isinstance(value, Reference) or value.kind != "dtype":
        return False
    return bool(getattr(torch, value.name).is_floating_point)


def _positive(value: Argument, rank: int) -> Argument:
    if isinstance(value, tuple):
        return tuple(_positive(entry, rank) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        return value + rank
    return value


def beside_the_samples(call: Call, position: int, parts: int) -> Call | None:
    """The call on ``(samples, parts, ...)`` instead of ``(samples * parts, ...)``.

    Args:
        call: with non-negative dimensions.
        position: the dimension of the first operand that holds samples and parts.
        parts: how many each sample has.

    Returns:
        The call with the dimensions counted anew; None where the op may mix samples and parts.
    """
    op, args, kwargs = call
    if op in _RESHAPES:
        return call
    if op == "aten.bmm":
        op = "aten.matmul"
    table = {} if op in _NAMED_ONLY else _DIMENSIONS.get(op, {})
    if not table and op not in _ALIKE and op not in POINTWISE:
        return None
    names = set(table.values())
    given = [value for index, value in enumerate(args) if index in table]
    given += [value for key, value in kwargs if key in names]
    touched = {entry for value in given for entry in _entries(value)}
    if position in touched and op != "aten.permute":
        return None
    positional = tuple(
        _recounted(value, position, whole=op == "aten.permute") if index in table else value
        for index, value in enumerate(args)
    )
    named = tuple(
        (key, _recounted(value, position, whole=op == "aten.permute") if key in names else value)
        for key, value in kwargs
    )
    return op, positional, named


def _entries(value: Argument) -> tuple[Argument, ...]:
    return value if isinstance(value, tuple) else (value,)


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


def part(op: str, source: FxNode, args: Sequence[Argument], index: int) -> Call | None:
    """The call that gives one entry of a tuple of results, or None if no rule could know it.

    Pieces of `chunk` and `split` become slices; a slice is cut off at the end of the tensor, so
    it stays right when the same graph is used for another width.
    """
    if op in _VALUES_FIRST:
        return _values(op, source, args) if index == 0 else None
    values = source.meta.get("val")
    operand = source.args[0]
    if op not in _PARTS or not isinstance(operand, FxNode) or values is None:
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


def _values(op: str, source: FxNode, args: Sequence[Argument]) -> Call:
    """The call for the first result; models with in-place operations come decomposed."""
    if op == "aten._native_batch_norm_legit_no_training":
        # (x, weight, bias, mean, variance, momentum, eps)
        return "aten.batch_norm", (*args[:5], False, args[5], args[6], False), ()
    if op == "aten.native_layer_norm":
        return "aten.layer_norm", tuple(args), ()
    return op, tuple(args), _kwargs(source)


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


def only_constants(args: Sequence[Argument], kwargs: Sequence[tuple[str, Argument]]) -> bool:
    """Whether an op could be evaluated without parameters, inputs and the number of samples."""

    def fixed(value: Argument) -> bool:
        if isinstance(value, tuple):
            return all(fixed(entry) for entry in value)
        return not isinstance(value, Reference) or value.kind in ("constant", "dtype")

    return all(fixed(value) for value in args) and all(fixed(value) for _, value in kwargs)

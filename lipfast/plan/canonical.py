"""What export writes in several ways, in one: dimensions counted from the front, parts as slices.

Rules can then see which dimension is the samples (0), whatever the rank of an operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node as FxNode

from lipfast.plan.graph import Argument, Reference

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
# Left out, these mean dimension 0.
_DEFAULT_ZERO = frozenset({"aten.cat", "aten.stack"})

_PARTS = frozenset({"aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind"})
# Of these results only the first, the values, has a rule; the second are indices.
_VALUES_FIRST = frozenset(
    {
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
    return isinstance(value, Reference) and value.kind == "dtype"


def _positive(value: Argument, rank: int) -> Argument:
    if isinstance(value, tuple):
        return tuple(_positive(entry, rank) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool) and value < 0:
        return value + rank
    return value


def part(op: str, source: FxNode, args: Sequence[Argument], index: int) -> Call | None:
    """The call that gives one entry of a tuple of results, or None if no rule could know it.

    Pieces of `chunk` and `split` become slices; a slice is cut off at the end of the tensor, so
    it stays right when the same graph is used for another width.
    """
    if op in _VALUES_FIRST:
        return (op, tuple(args), _kwargs(source)) if index == 0 else None
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


def rank_of_first_tensor(node: FxNode) -> int:
    """Number of dimensions of the first operand that is a tensor."""
    for value in node.args:
        entry = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(entry, FxNode):
            result = entry.meta.get("val")
            if isinstance(result, Tensor):
                return int(result.dim())
            if isinstance(result, (list, tuple)):  # `node` takes one entry of a tuple of results
                return rank_of_first_tensor(entry)
    return 0


def only_constants(args: Sequence[Argument], kwargs: Sequence[tuple[str, Argument]]) -> bool:
    """Whether an op could be evaluated without parameters, inputs and the number of samples."""

    def fixed(value: Argument) -> bool:
        if isinstance(value, tuple):
            return all(fixed(entry) for entry in value)
        return not isinstance(value, Reference) or value.kind in ("constant", "dtype")

    return all(fixed(value) for value in args) and all(fixed(value) for _, value in kwargs)

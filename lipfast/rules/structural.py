"""Rules of operations that only move entries: reshape, permute, slice, pad, repeat, join."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.ops.chain_stages import Flatten
from lipfast.rules.arithmetic import aligned
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.pooling import error_of_moved_entries, power, same_entries
from lipfast.rules.products import copy_count
from lipfast.rules.registry import Arguments, Call, Dimensions, Errors, rule
from lipfast.rules.upward import Upward, p_norm


def _same_entries(call: Call) -> Magnitude:
    """Entries are moved, at most once each; rows stay together if the last axis only splits."""
    size, shape = call.magnitudes[0], call.operand_shapes[0]
    split = bool(shape and call.node.shape) and shape[-1] % max(1, call.node.shape[-1]) == 0
    return Magnitude(size.entry, size.row if split else Upward(math.inf), size.total)


def _rows_kept(call: Call) -> Magnitude:
    """Entries are moved, at most once each; rows stay rows where the last axis is not touched."""
    size, node = call.magnitudes[0], call.node
    last = len(call.operand_shapes[0])
    kept = node.op in ("aten.slice", "aten.flip", "aten.roll")  # the norm of a row has no order
    if node.op == "aten.permute":
        kept = node.dimensions(1, "dims")[-1] == last
    elif node.op == "aten.transpose":
        kept = last not in {*node.dimensions(1, "dim0"), *node.dimensions(2, "dim1")}
    elif node.op == "aten.select":
        kept = node.dimensions(1, "dim") != (last,)
    return Magnitude(size.entry, size.row if kept else Upward(math.inf), size.total)


def _evaluate_reshape(arguments: Arguments) -> Tensor:
    x = arguments.value(arguments.node.args[0])
    return x.reshape(*x.shape[:2], *arguments.node.shape)


def _error_reshape(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if errors[0] is None else errors[0].reshape(output.shape)


def _reshape_supported(node: Node) -> str | None:
    kinds = {ref.kind for ref in node.references()}
    return None if kinds <= {"node", "batch"} else "reinterprets the bits of its input"


def _flattening(node: Node, shape: tuple[int, ...]) -> Sequence[Flatten] | None:
    if node.shape == shape:
        return []
    return [Flatten()] if len(node.shape) == 1 else None


_reshape_rule = partial(
    rule,
    supports=_reshape_supported,
    magnitude=_same_entries,
    evaluate=_evaluate_reshape,
    error=_error_reshape,
    reshapes=True,
    moves=True,
    stage=_flattening,
)


@_reshape_rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unflatten", batch="size")
@_reshape_rule("aten.flatten", "aten.squeeze", "aten.unsqueeze")
def reshape(call: Call) -> Upward:
    """Keep the norm: a reshape of every sample has the constant 1.

    The traced shapes keep the sample dimension in front and its number of entries, and elements
    keep their order: so samples are never mixed.
    """
    return call.input


def _permutation_supported(node: Node) -> str | None:
    """The samples stay in front."""
    if node.op == "aten.permute":
        dims = node.dimensions(1, "dims")
        return None if dims[:1] == (0,) else "moves the samples"
    if node.op == "aten.transpose":
        moved = {*node.dimensions(1, "dim0"), *node.dimensions(2, "dim1")}
        return "moves the samples" if 0 in moved else None
    if node.op in ("aten.flip", "aten.roll"):
        dims = node.dimensions(2 if node.op == "aten.roll" else 1, "dims")
        return "mixes the samples" if not dims or 0 in dims else None
    return None


_permutation_rule = partial(
    rule, supports=_permutation_supported, magnitude=_rows_kept, error=error_of_moved_entries
)
_named_permutation_rule = partial(_permutation_rule, leading=True, moves=True)


@_named_permutation_rule("aten.permute", dimensions=Dimensions({1: "dims"}, order=True))
@_named_permutation_rule("aten.transpose", dimensions={1: "dim0", 2: "dim1"})
@_named_permutation_rule("aten.flip", dimensions={1: "dims"})
@_named_permutation_rule("aten.roll", dimensions={2: "dims"})
@_permutation_rule("aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.channel_shuffle")
def permutation(call: Call) -> Upward:
    """1 in every norm: the entries of a sample in another order."""
    return call.input


def _selection_supported(node: Node) -> str | None:
    whole = node.argument(2, "start") in (None, 0)
    if node.op == "aten.slice" and node.dimensions(1, "dim") in ((), (0,)):
        end = node.argument(3, "end")
        all_of_them = end is None or (isinstance(end, int) and end >= 2**62)
        step = node.argument(4, "step", 1)
        return None if whole and all_of_them and step == 1 else "drops samples"
    if node.op == "aten.select" and 0 in node.dimensions(1, "dim"):
        return "picks a sample"
    return None


_selection_rule = partial(
    rule,
    supports=_selection_supported,
    error=error_of_moved_entries,
    magnitude=_rows_kept,
    dimensions={1: "dim"},
    leading=True,
    moves=True,
)


@_selection_rule("aten.slice", batch="size")
@_selection_rule("aten.select")
def selection(call: Call) -> Upward:
    """1 in every norm: some of the entries, each once."""
    return call.input


def _padding_error(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """Copied entries carry their errors, constants none."""
    x, node = arguments.node.reference(0), arguments.node
    moved = error_of_moved_entries(arguments, errors, output)
    plain = node.op == "aten.im2col" or node.argument(2, "mode", "constant") != "constant"
    if errors[0] is None or plain:
        return moved
    inside = arguments.apply({x: torch.ones_like(errors[0])}) != arguments.apply(
        {x: torch.zeros_like(errors[0])}
    )
    return torch.where(inside, moved, torch.zeros_like(moved))


def _gather_supported(node: Node) -> str | None:
    kinds = [ref.kind for ref in node.references() if ref.kind not in ("batch", "dtype")]
    if kinds.count("node") != 1:
        return "with computed indices"
    if not isinstance(node.args[0], Reference) or node.args[0].kind != "node":
        return "of a parameter"
    indices = node.argument(1, "indices")
    if node.op == "aten.index" and isinstance(indices, tuple) and indices[0] is not None:
        return "over the samples"
    if node.op == "aten.unfold" and 0 in node.dimensions(1, "dimension"):
        return "over the samples"
    sizes = node.argument(1, "repeats" if node.op == "aten.repeat" else "dim")
    first = sizes[0] if isinstance(sizes, tuple) and sizes else 1
    if node.op in ("aten.index_select", "aten.repeat_interleave"):
        return "over the samples" if node.argument(2, "dim") in (None, 0) else None
    return "repeats the samples" if node.op == "aten.repeat" and first != 1 else None


_gather_rule = partial(
    rule,
    supports=_gather_supported,
    magnitude=same_entries,
    error=error_of_moved_entries,
    moves=True,
    integers=True,
)


@_gather_rule("aten.expand", "aten.repeat", batch="repeat")
@_gather_rule("aten.repeat_interleave", "aten.index", "aten.index_select")
# For images: a dimension in front of the channels is not one of a sample's, so not `leading`.
@_gather_rule("aten.unfold", dimensions={1: "dimension"})
@rule(
    "aten.pad",
    "aten.constant_pad_nd",
    error=_padding_error,
    magnitude=lambda call: _padded_magnitude(call),  # noqa: PLW0108 (defined below)
    leading=True,
    moves=True,
    fills=(2, 3),  # `pad` has a word at 2, which is no number
)
@rule("aten.im2col", error=_padding_error)
@rule(
    "aten.upsample_nearest1d",
    "aten.upsample_nearest2d",
    "aten.upsample_nearest3d",
    error=error_of_moved_entries,
)
def copies(call: Call) -> Upward:
    """``m^(1/p)`` for entries that are read at most m times; 1 for p = inf.

    Every output is an input or a constant, so the map is linear up to a constant and
    ``sum_j |y_j|^p`` counts every ``|x_i|^p`` at most m times (exactly: the operator norm). The
    numbers of times are counted by moving the positions themselves.
    """
    shape = call.operand_shapes[0]
    size = math.prod(shape)
    positions = torch.arange(1, size + 1, dtype=torch.float64, device="cpu").reshape(shape)
    # What the op puts in by itself (padding) is there for any input, also for the next positions.
    moved, shifted = call.apply(positions), call.apply(positions + size)
    read = moved[(shifted - moved) == size].long().flatten()
    largest = int(torch.bincount(read).max()) if read.numel() else 0
    return call.input * power(largest, call.norm)


def _evaluate_repeated(arguments: Arguments) -> Tensor:
    x, same = (arguments.value(argument) for argument in arguments.node.args[:2])
    return same.expand(x.shape[0], x.shape[1], *same.shape[2:])


@rule(
    "lipfast.repeated",
    evaluate=_evaluate_repeated,
    error=lambda arguments, errors, output: torch.zeros_like(output),
    magnitude=lambda call: call.magnitudes[1],
    parameter_errors="added",
)
def repeated(call: Call) -> Upward:
    """0: a tensor that is the same for all samples, such as a class token."""
    return Upward.of(0.0)


def _padded_magnitude(call: Call) -> Magnitude:
    """Zeros add nothing; other constants and copies count entry by entry."""
    size, node = call.magnitudes[0], call.node
    plain = node.op == "aten.constant_pad_nd"
    if not plain and node.argument(2, "mode", "constant") != "constant":
        return Magnitude(entry=size.entry)
    value = abs(node.number(2 if plain else 3, "value", 0.0))
    return size if value == 0.0 else Magnitude(entry=size.entry.maximum(Upward.of(value)))


def _join_supported(node: Node) -> str | None:
    parts = node.args[0]
    if not isinstance(parts, tuple) or not all(isinstance(value, Reference) for value in parts):
        return "of other things than tensors"
    if 0 in node.dimensions(1, "dim"):
        return "joins the samples"
    whole = all(reference.kind == "node" for reference in node.references())
    return None if whole else "with a tensor that is the same for all samples"


def _error_join(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    parts = zip(arguments.node.references(), errors, strict=True)
    return arguments.apply(
        {
            part: torch.zeros_like(arguments.value(part)) if error is None else error
            for part, error in parts
        }
    )


def _join_magnitude(call: Call) -> Magnitude:
    entry, total = Upward.of(0.0), Upward.of(0.0)
    for size in call.magnitudes:
        entry, total = entry.maximum(size.entry), total + size.total * size.total
    return Magnitude(entry=entry, total=total.square_root())


_join_rule = partial(
    rule,
    supports=_join_supported,
    error=_error_join,
    magnitude=_join_magnitude,
    moves=True,
    integers=True,
    parameter_errors="added",
)


@_join_rule("aten.cat", dimensions=Dimensions({1: "dim"}, default=0), leading=True)
@_join_rule("aten.stack", dimensions=Dimensions({1: "dim"}, of_result=True, default=0))
def join(call: Call) -> Upward:
    """The p-norm of the branches' constants: their sum for p = 1, the largest for p = inf.

    An operand that occurs twice counts twice.
    """
    return p_norm(call.operands, call.norm)


def _choices(node: Node) -> tuple[Argument, tuple[Argument, ...]]:
    """The mask; what is chosen where it is true, and where it is not."""
    if node.op == "aten.where":
        return node.args[0], node.args[1:3]
    return node.args[1], (node.args[2], node.args[0])


def _choice_supported(node: Node) -> str | None:
    """The mask is fixed; what it chooses from is of activations, at least one."""
    mask, choices = _choices(node)
    if not isinstance(mask, Reference) or mask.kind == "node":
        return "with a mask that depends on the input"
    active = [isinstance(v, Reference) and v.kind == "node" for v in choices]
    filled = node.op == "aten.where" or not active[0]
    return None if any(active) and filled else "of other things than activations"


def _error_choice(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """The errors of what is chosen; numbers have none."""
    mask, choices = _choices(arguments.node)
    references = [ref for ref in arguments.node.references() if ref.kind != "dtype"]
    known: dict[Argument, Tensor | None] = dict(zip(references, errors, strict=True))
    parts = []
    for choice in choices:
        error = known.get(choice)
        zero = output.new_zeros(())
        parts.append(zero if error is None else aligned(error, choice, output.dim()))
    table = aligned(arguments.value(mask), mask, output.dim()).bool()
    return torch.where(table, parts[0], parts[1]).expand_as(output)


def _choice_magnitude(call: Call) -> Magnitude:
    references = [ref for ref in call.node.references() if ref.kind != "dtype"]
    entry = Upward.of(0.0)
    for choice in _choices(call.node)[1]:
        if isinstance(choice, Reference):
            entry = entry.maximum(call.magnitudes[references.index(choice)].entry)
        else:
            entry = entry.maximum(Upward.of(abs(float(cast(float, choice)))))
    return Magnitude(entry=entry)


@rule(
    "aten.where",
    "aten.masked_fill",
    supports=_choice_supported,
    error=_error_choice,
    magnitude=_choice_magnitude,
    leading=True,
    moves=True,
    integers=True,
    parameter_errors="read",
    fills=(1, 2),
)
def choice(call: Call) -> Upward:
    """Entries of one operand or the other, by a fixed mask: the p-norm of their constants.

    What the mask never chooses adds nothing; an operand that is broadcast counts as often as it is
    copied.
    """
    mask, choices = _choices(call.node)
    table = call.tensor(mask).bool()
    chosen = bool(table.any()), not bool(table.all())
    references = [ref for ref in call.node.references() if ref.kind != "dtype"]
    parts = []
    for argument, wanted in zip(choices, chosen, strict=True):
        if wanted and isinstance(argument, Reference):
            index = references.index(argument)
            parts.append(call.operands[index] * power(copy_count(call, index), call.norm))
    return p_norm(parts, call.norm)

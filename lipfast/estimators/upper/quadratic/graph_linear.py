"""Activations as linear functions of a few tensors, with the rounding of their coefficients.

Part of the proof: a node is linear because its rule is one of lipfast's own that is known to be,
never because of what it does to some numbers. Coefficients are what the node makes of unit vectors,
without what it adds, and their errors are its running errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.enclosure import node_error
from lipfast.estimators.upper.quadratic.graph_room import QuadraticBoundError, Room
from lipfast.graph.nodes import Argument, Constant, Node, Reference, error_name
from lipfast.ops.fetched import sent
from lipfast.plan.interpret import NodeArguments
from lipfast.plan.state import device_of, floating_as
from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF, widened
from lipfast.rules.registry import rule_of, written_here

# Linear in their operand, or up to what stands at these places of the arguments.
_ADDED: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("aten.linear", "lipfast.matmul", "aten.convolution"), (2,)),
    **{f"aten.conv{n}d": (2,) for n in (1, 2, 3)},
    **{f"aten.conv_transpose{n}d": (2,) for n in (1, 2, 3)},
    **dict.fromkeys(("aten.batch_norm", "aten.instance_norm"), (2, 3)),
    **dict.fromkeys(("aten.add", "aten.sub", "aten.rsub"), (0, 1)),
    **dict.fromkeys(("aten.cat", "aten.stack"), (0,)),
    **{"aten.pad": (3,), "aten.constant_pad_nd": (2,), "aten.where": (1, 2)},
    "aten.masked_fill": (2,),
}
_NAMES = {2: ("bias", "value"), 3: ("running_mean", "value")}
_LINEAR_OPS = frozenset(
    f"aten.{name}"
    for name in (
        *("neg", "mean", "sum", "im2col", "mul", "div", "matmul", "bmm"),
        *("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze"),
        *("permute", "transpose", "flip", "roll", "slice", "select", "unfold"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("expand", "repeat", "repeat_interleave", "index", "index_select"),
        *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)),
        *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    )
)
# Of these each entry of the result is a sum of products of the operand's entries and weights.
_COPYING = frozenset(
    ("aten.linear", *(f"aten.{k}{n}d" for k in ("conv", "conv_transpose") for n in (1, 2, 3)))
)
# These are linear in one activation, not in two.
_BILINEAR = ("aten.mul", "aten.div", "aten.matmul", "aten.bmm")


@dataclass(frozen=True)
class Coefficients:
    """A matrix that rounding put near the true one.

    Attributes:
        value: (rows, columns); None for the identity.
        error: bound of the distance, entry by entry; None where there is none.
    """

    value: Tensor | None = None
    error: Tensor | None = None

    def dense(self, size: int, like: Tensor) -> Tensor:
        """The matrix itself, which has this many columns."""
        if self.value is not None:
            return self.value
        return torch.eye(size, dtype=like.dtype, device=like.device)

    def spread(self, size: int, like: Tensor) -> Tensor:
        """The error itself."""
        return torch.zeros_like(self.dense(size, like)) if self.error is None else self.error


Expression = Mapping[int, Coefficients]
"""A tensor by the blocks that it is linear in, without what does not depend on the inputs."""


def is_linear(node: Node, operands: Sequence[str]) -> bool:
    """Whether a node is linear in the operands that depend on the inputs, up to a constant.

    Args:
        node: of a graph.
        operands: names of these, once each.
    """
    rule = rule_of(node.op)
    if not written_here(rule) or rule.error is None:
        return False
    if node.op in _BILINEAR:
        # Once: x x is no linear function of x.
        return sum(name in operands for name in node.names("node")) == 1 and not _divides(node)
    if node.op == "aten.instance_norm" and node.argument(5, "use_input_stats") is True:
        return False
    mask = node.args[0] if node.op == "aten.where" else None
    if node.op == "aten.masked_fill":
        mask = node.args[1]
    fixed = not isinstance(mask, Reference) or mask.kind != "node"
    return fixed and (node.op in _LINEAR_OPS or node.op in _ADDED)


def _divides(node: Node) -> bool:
    divisor = node.args[1] if node.op == "aten.div" else None
    return isinstance(divisor, Reference) and divisor.kind == "node"


class _Tables(NamedTuple):
    """Parameters (1, *shape) and constants of a node, under names of its own for zeros."""

    parameters: dict[str, Tensor]
    constants: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LinearNodes:
    """Linear nodes of one network.

    Attributes:
        parameters: of the network, with the errors of those that are computed.
        constants: of the plan.
        room: for matrices.
    """

    parameters: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    room: Room

    @cached_property
    def like(self) -> Tensor:
        """A float64 tensor on the device where matrices are."""
        return torch.zeros((), dtype=torch.float64, device=device_of(self.parameters))

    def expression(
        self,
        node: Node,
        operands: Mapping[str, tuple[Expression, tuple[int, ...]]],
        sizes: Sequence[int],
    ) -> Expression:
        """What a linear node makes of expressions.

        Args:
            node: see `is_linear`.
            operands: name of a node that it reads -> its expression and shape; an empty expression
                is a tensor that does not depend on the inputs.
            sizes: of the blocks.

        Raises:
            QuadraticBoundError: a matrix is too large, or a coefficient is not finite.
        """
        plain, tables = self._without_constants(node)
        blocks = dict.fromkeys(block for own, _ in operands.values() for block in own)
        found = {}
        for block in blocks:
            part = _passed_on(node, operands, block, self.like)
            if part is not None:
                found[block] = part
                continue
            part = self._of_block(plain, tables, operands, block, sizes[block])
            if part.error is not None or bool(part.value.any()):  # type: ignore[union-attr]
                found[block] = part
        return found

    def _of_block(
        self,
        node: Node,
        tables: _Tables,
        operands: Mapping[str, tuple[Expression, tuple[int, ...]]],
        block: int,
        size: int,
    ) -> Coefficients:
        shapes = [node.shape, *(shape for _, shape in operands.values())]
        largest = max(map(math.prod, shapes))
        what = f"{node.op} in module '{node.module}' as a matrix of {largest} x {size}"
        self.room.require(what, 8 * 4 * largest * size)
        columns, errors = {}, {}
        for name, (expression, shape) in operands.items():
            part = expression.get(block)
            if part is None:
                columns[name] = self.like.new_zeros((1, size, *shape))
                continue
            columns[name] = part.dense(size, self.like).mT.reshape(1, size, *shape)
            if part.error is not None:
                errors[name] = part.error.mT.reshape(1, size, *shape)
        arguments = NodeArguments(node, columns, tables.parameters, tables.constants)
        # Running errors hold for sums of products in any order, not for transforms.
        with torch.backends.cudnn.flags(enabled=False):
            output = arguments.replaced({}, {})
            if not errors and _copies_weights(node, tables, operands, block):
                error = output.new_zeros(()).expand_as(output)
            else:
                error = node_error(arguments, tables.parameters, errors, output)
        if not bool((torch.isfinite(output) & torch.isfinite(error)).all()):
            raise QuadraticBoundError(
                f"{node.op} in module '{node.module}' has coefficients beyond float64"
            )
        flat = output.reshape(size, -1).mT.contiguous()
        spread = error.reshape(size, -1).mT.contiguous() if bool(error.any()) else None
        return Coefficients(flat, spread)

    def _without_constants(self, node: Node) -> tuple[Node, _Tables]:
        """The node with zeros for all that it adds, and its tensors."""
        plain, added = without_constants(node)
        zeros = {
            name: torch.zeros_like(self._tensor(argument)).double().unsqueeze(0)
            for name, argument in added.items()
        }
        parameters = dict(zeros)
        for name in plain.names("parameter"):
            for own in (name, error_name(name)):
                if own not in zeros and own in self.parameters:
                    tensor = self.parameters[own].detach().unsqueeze(0)
                    parameters[own] = floating_as(tensor, torch.float64)
        constants = {
            name: sent(floating_as(self.constants[name].tensor(), torch.float64), self.like.device)
            for name in plain.names("constant")
        }
        return plain, _Tables(parameters, constants)

    def _tensor(self, reference: Reference) -> Tensor:
        if reference.kind == "parameter":
            return self.parameters[reference.name].detach()
        return sent(self.constants[reference.name].tensor(), self.like.device)


def _passed_on(
    node: Node,
    operands: Mapping[str, tuple[Expression, tuple[int, ...]]],
    block: int,
    like: Tensor,
) -> Coefficients | None:
    """What a sum or a difference makes of a block that only one operand has; None for others."""
    own = [name for name, (expression, _) in operands.items() if block in expression]
    if node.op not in ("aten.add", "aten.sub") or len(own) != 1:
        return None
    expression, shape = operands[own[0]]
    if node.names("node").count(own[0]) != 1 or shape != node.shape:
        return None
    part, reference = expression[block], Reference("node", own[0])
    if node.args[0] == reference:
        return part
    if node.args[1:2] != (reference,) or node.argument(2, "alpha", 1) != 1:
        return None
    if node.op == "aten.add":
        return part
    return Coefficients(-part.dense(math.prod(shape), like), part.error)


def _copies_weights(
    node: Node,
    tables: _Tables,
    operands: Mapping[str, tuple[Expression, tuple[int, ...]]],
    block: int,
) -> bool:
    """Whether a node makes of each unit vector a column of its weights, entry by entry.

    Each entry of the result is a sum of at most one product of a weight and 1, and of zeros: exact
    in any order, short of a transform. Circular padding would read an entry twice.
    """
    if node.op not in _COPYING or any(key == "padding_mode" for key, _ in node.kwargs):
        return False
    weight, parts = node.reference(1), [own.get(block) for own, _ in operands.values()]
    unit = len(parts) == 1 and parts[0] is not None and parts[0].value is None
    stored = weight.kind != "node" and error_name(weight.name) not in tables.parameters
    return unit and stored


def without_constants(node: Node) -> tuple[Node, dict[str, Reference]]:
    """The linear part of a node: zeros in the place of what it adds.

    Zeros have names of their own: a tensor may be added in one place and multiply in another.

    Returns:
        The node, and the names of parameters that are zeros in it, with what they stand for.
    """
    zeros: dict[str, Reference] = {}

    def zero(argument: Argument) -> Argument:
        if isinstance(argument, tuple):
            return tuple(zero(entry) for entry in argument)
        if isinstance(argument, Reference) and argument.kind in ("parameter", "constant"):
            name = f"zeros like {argument.kind} {argument.name}"
            zeros[name] = argument
            return Reference("parameter", name)
        number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
        return 0.0 if number else argument

    places = _ADDED.get(node.op, ())
    args = tuple(zero(value) if at in places else value for at, value in enumerate(node.args))
    words = {word for at in places for word in _NAMES.get(at, ())}
    kwargs = tuple((key, zero(value) if key in words else value) for key, value in node.kwargs)
    return replace(node, args=args, kwargs=kwargs), zeros


def _rounded(value: Tensor, error: Tensor) -> Coefficients:
    return Coefficients(value, error if bool(error.any()) else None)


def scaled_rows(expression: Expression, factors: Tensor, sizes: Sequence[int]) -> Expression:
    """``diag(c) X`` for exact numbers c."""
    found = {}
    for block, part in expression.items():
        value = part.dense(sizes[block], factors) * factors[:, None]
        error = part.spread(sizes[block], factors) * factors.abs()[:, None]
        rounding = torch.where(value == 0, 0.0, value.abs() * UNIT_ROUNDOFF)
        total = widened(error + rounding, 4)
        inexact = (part.dense(sizes[block], factors) != 0) & (factors != 0)[:, None]
        found[block] = _rounded(value, total + torch.where(inexact, UNDERFLOW, 0.0))
    return found


def selected_rows(
    expression: Expression, places: Tensor, sizes: Sequence[int], like: Tensor
) -> Expression:
    """Some of the rows."""
    return {
        block: Coefficients(
            part.dense(sizes[block], like)[places],
            None if part.error is None else part.error[places],
        )
        for block, part in expression.items()
    }


def joined_rows(
    parts: Sequence[tuple[Expression, int]], widths: Mapping[int, int], like: Tensor
) -> Coefficients:
    """The rows of several expressions as a matrix of all blocks that are given.

    Args:
        parts: expressions with their numbers of rows; blocks that are not given are left out.
        widths: sizes of the blocks, in order.
        like: dtype and device.
    """
    if len(parts) == 1 and len(widths) == 1:
        found = parts[0][0].get(next(iter(widths)))
        if found is not None:
            return found
    rows = sum(count for _, count in parts)
    value = like.new_zeros(rows, sum(widths.values()))
    error = torch.zeros_like(value)
    row = 0
    for expression, count in parts:
        column = 0
        for block, width in widths.items():
            part = expression.get(block)
            if part is not None:
                place = slice(row, row + count), slice(column, column + width)
                value[place] = part.dense(width, like)
                if part.error is not None:
                    error[place] = part.error
            column += width
        row += count
    return _rounded(value, error)

"""Rules of sums, maxima, scalings and means of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.ops import chain_stages
from lipfast.rounding import SMALLEST, UNIT_ROUNDOFF, widened
from lipfast.rules import products, slopes
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.pooling import error_of_a_mean, power, reduced_count, same_entries
from lipfast.rules.registry import Arguments, Call, Errors, rule
from lipfast.rules.running_errors import error_of_extremum, finished
from lipfast.rules.upward import Upward, p_norm


def _factors(node: Node) -> tuple[float, float]:
    """What a sum multiplies its operands by: ``x + a y``, ``x - a y``, and ``y - a x`` (rsub)."""
    alpha = node.number(2, "alpha", 1.0)
    factors = {"aten.add": (1.0, alpha), "aten.sub": (1.0, -alpha), "aten.rsub": (-alpha, 1.0)}
    return factors[node.op]


def _factor_sizes(node: Node) -> tuple[float, float]:
    first, second = _factors(node)
    return abs(first), abs(second)


def _copies(call: Call, position: int) -> Upward:
    """How much broadcasting one operand to the result's shape multiplies its norm."""
    size = math.prod(call.operand_shapes[position])
    copies = Upward.of(max(1.0, math.prod(call.node.shape) / max(1, size)))
    if math.isinf(call.norm):
        return Upward.of(1.0)
    return copies if call.norm == 1 or copies == Upward.of(1.0) else copies.square_root()


def _aligned(arguments: Arguments, argument: Argument) -> Tensor | float:
    """Return an operand of a broadcasting op, its sample dimensions aligned from the right."""
    if isinstance(argument, (bool, int, float)):
        return float(argument)
    return aligned(arguments.value(argument), argument, len(arguments.node.shape) + 2)


def aligned(value: Tensor, argument: Argument, rank: int) -> Tensor:
    """An operand, or its error, with as many dimensions: those missing before the sample's."""
    leading = 2 if isinstance(argument, Reference) and argument.kind == "node" else 1
    ones = [1] * (rank - value.dim())
    return value.reshape(*value.shape[:leading], *ones, *value.shape[leading:])


def _entries(arguments: Arguments, argument: Argument, output: Tensor) -> Tensor:
    """`_aligned`, a number as a tensor like the result."""
    value = _aligned(arguments, argument)
    if isinstance(value, Tensor):
        return value.to(output)
    return torch.full((), value, dtype=output.dtype, device=output.device)


def _evaluate_sum(arguments: Arguments) -> Tensor:
    node = arguments.node
    first, second = (_aligned(arguments, value) for value in node.args[:2])
    one, other = _factors(node)
    # In the order that rounds least: a factor of 1 is exact.
    return cast(Tensor, first + other * second if one == 1.0 else second + one * first)


def _error_sum(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    node = arguments.node
    remaining = iter(errors)
    total = output.abs() * UNIT_ROUNDOFF
    for factor, argument in zip(_factor_sizes(node), node.args[:2], strict=True):
        if factor != 1.0:  # the product alpha y is rounded too
            # In this order: 2 u alpha may underflow where u |alpha y| does not.
            product = _entries(arguments, argument, output).abs() * factor
            total = total + product * (2 * UNIT_ROUNDOFF)
        error = next(remaining) if isinstance(argument, Reference) else None
        if error is not None:
            total = total + error * factor
    return _exact_where_masked(arguments, errors, output, finished(total, 8))


def _exact_where_masked(
    arguments: Arguments, errors: Errors, output: Tensor, total: Tensor
) -> Tensor:
    """-inf of a mask and any number give -inf: no error, where that is the result.

    A mask is a constant, or what it was added to before: -inf without an error.
    """
    hidden = output == -math.inf
    # A look at a device would make the host wait.
    if not output.is_cuda and not bool(hidden.any()):
        return total
    node, remaining = arguments.node, iter(errors)
    masks = torch.zeros_like(hidden)
    for factor, argument in zip(_factors(node), node.args[:2], strict=True):
        operand = _entries(arguments, argument, output) * factor == -math.inf
        error = next(remaining) if isinstance(argument, Reference) else None
        if error is not None:
            operand &= _alignments([error], output)[0] == 0
        masks |= operand
    return torch.where(hidden & masks, 0.0, total)


def _sum_magnitude(call: Call) -> Magnitude:
    """Magnitudes of a sum add; what is broadcast counts by its entries."""
    total, position = Magnitude(*[Upward.of(0.0)] * 3), 0
    for factor, argument in zip(_factor_sizes(call.node), call.node.args[:2], strict=True):
        if isinstance(argument, Reference):
            size = call.magnitudes[position]
            if products.copy_count(call, position) > 1:
                size = Magnitude(entry=size.entry)
            position += 1
        else:
            assert isinstance(argument, (int, float))
            size = Magnitude(entry=Upward.of(abs(float(argument))))
        total = total.plus(size.within(call.node.shape).scaled(factor))
    return total


@rule(
    "aten.add",
    "aten.sub",
    "aten.rsub",
    evaluate=_evaluate_sum,
    error=_error_sum,
    magnitude=_sum_magnitude,
    leading=True,
    integers=True,
    parameter_errors="added",
    slopes=slopes.of_sum,
)
def add(call: Call) -> Upward:
    """``L(x + alpha y) = L(x) + |alpha| L(y)``; constants add nothing (residual: 1 + branch).

    A broadcast activation counts as often as it is copied: ``sqrt(copies)`` for norm 2,
    ``copies`` for norm 1.
    """
    total, position = Upward.of(0.0), 0
    for factor, argument in zip(_factor_sizes(call.node), call.node.args[:2], strict=True):
        if isinstance(argument, Reference):
            total = total + call.operands[position] * factor * _copies(call, position)
            position += 1
    return total


def _scale_supported(node: Node) -> str | None:
    if node.op != "aten.div":
        return None
    if products.activations(node) > 1:
        return "a product or quotient of two activations"
    first = node.args[0]
    if not isinstance(first, Reference) or first.kind != "node":
        return "division by an activation"
    return None if node.argument(2, "rounding_mode") is None else "division that rounds"


def _other(node: Node) -> Argument:
    first, second = node.args[:2]
    return second if isinstance(first, Reference) and first.kind == "node" else first


def _evaluate_scale(arguments: Arguments) -> Tensor:
    node = arguments.node
    first, second = (_aligned(arguments, value) for value in node.args[:2])
    return cast(Tensor, first / second if node.op == "aten.div" else first * second)


def _error_scale(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    node = arguments.node
    if products.divides(node):
        x, y = (_entries(arguments, value, output) for value in node.args[:2])
        found = iter(_alignments(errors, output))
        both = [next(found) if isinstance(value, Reference) else None for value in node.args[:2]]
        return products.error_of_quotient(y, both, output)
    if products.activations(node) == 2:
        x, y = (_entries(arguments, value, output) for value in node.args[:2])
        return products.error_of_product(x, y, _alignments(errors, output), output)
    factor = _entries(arguments, _other(node), output).abs()
    total = output.abs() * UNIT_ROUNDOFF
    if node.op == "aten.div":
        # On CUDA torch divides by a number by multiplying with its reciprocal: two roundings, the
        # first of which may be that of a denormal number.
        total = 2 * total + _entries(arguments, node.args[0], output).abs() * SMALLEST
    for error in errors:
        if error is not None:  # dividing: the reciprocal of a factor may be denormal, or inf
            total = total + (error / factor if node.op == "aten.div" else error * factor)
    return finished(total, 8)


_scaling_rule = partial(
    rule,
    supports=_scale_supported,
    evaluate=_evaluate_scale,
    error=_error_scale,
    magnitude=lambda call: _scaled_magnitude(call),  # noqa: PLW0108 (defined below)
    product=lambda node: products.activations(node) == 2 or products.divides(node),
    leading=True,
    integers=True,
    slopes=slopes.of_scaling,
)


@_scaling_rule("aten.mul", parameter_errors="multiplied")
@_scaling_rule("aten.div")
def scale(call: Call) -> Upward:
    """Multiplication by a constant or a parameter: its largest absolute entry.

    Division: the reciprocal of the smallest absolute entry. Two activations: see
    `products.product`.
    """
    if products.divides(call.node):
        return call.unbounded(f"{call.node} divides by an activation")
    if products.activations(call.node) == 2:
        return products.product(call)
    factor = _largest_factor(call)
    if math.isinf(factor):
        return call.unbounded(f"{call.node} divides by zero")
    position = _activation_position(call.node)
    return call.operands[position] * factor * _copies(call, position)


def _activation_position(node: Node) -> int:
    """Where the activation stands among the tensor arguments."""
    tensors = [value for value in node.args[:2] if isinstance(value, Reference)]
    return next(index for index, value in enumerate(tensors) if value.kind == "node")


def _largest_factor(call: Call) -> float:
    """Largest magnitude that entries are multiplied by."""
    other = _other(call.node)
    if isinstance(other, (bool, int, float)):
        largest = smallest = abs(float(other))
    else:
        entries = call.tensor(other).detach().double().abs()
        rounding = call.rounding(other)
        if rounding is not None:
            entries = widened(entries + rounding, 4)
        largest, smallest = float(entries.max()), float(entries.min())
    if call.node.op != "aten.div":
        return largest
    return math.nextafter(1.0 / smallest, math.inf) if smallest > 0.0 else math.inf


def _scaled_magnitude(call: Call) -> Magnitude:
    if products.divides(call.node):
        return Magnitude()
    if products.activations(call.node) == 2:
        return products.magnitude_of_product(call)
    position = _activation_position(call.node)
    found = call.magnitudes[position].scaled(_largest_factor(call))
    return Magnitude(entry=found.entry) if products.copy_count(call, position) > 1 else found


def _alignments(errors: Errors, output: Tensor) -> list[Tensor | None]:
    """Errors with as many dimensions as the result, those missing in front of the sample's."""
    return [
        None
        if error is None
        else error.reshape(*error.shape[:2], *[1] * (output.dim() - error.dim()), *error.shape[2:])
        for error in errors
    ]


def _extremum_supported(node: Node) -> str | None:
    ok = all(isinstance(value, Reference) for value in node.args[:2]) and len(node.args) == 2
    return None if ok else "with other arguments than two tensors"


def _evaluate_extremum(arguments: Arguments) -> Tensor:
    first, second = (cast(Tensor, _aligned(arguments, v)) for v in arguments.node.args[:2])
    pick = torch.maximum if arguments.node.op == "aten.maximum" else torch.minimum
    return pick(first, second)


def _error_extremum(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    return error_of_extremum(_alignments(errors, output), output)


@rule(
    "aten.maximum",
    "aten.minimum",
    supports=_extremum_supported,
    magnitude=lambda call: Magnitude(
        entry=call.magnitudes[0].entry.maximum(call.magnitudes[1].entry)
    ),
    evaluate=_evaluate_extremum,
    error=_error_extremum,
    leading=True,
    integers=True,
)
def extremum(call: Call) -> Upward:
    """``|max(a, b) - max(a', b')| <= max(|a - a'|, |b - b'|)``: the p-norm of the two constants.

    A broadcast operand counts as often as it is copied.
    """
    parts = [call.operands[index] * _copies(call, index) for index in range(2)]
    return p_norm(parts, call.norm)


def _keeps_samples(node: Node) -> str | None:
    dimensions = node.dimensions(1, "dim")
    if not dimensions:
        return "over all dimensions, the samples among them"
    return "over the samples" if 0 in dimensions else None


_reduction_rule = partial(rule, supports=_keeps_samples, dimensions={1: "dim"}, leading=True)


def _error_reduced(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """The largest error of the entries; also for a minimum."""
    if errors[0] is None:
        return torch.zeros_like(output)
    dimensions = [dim + 1 for dim in arguments.node.dimensions(1, "dim")]
    return errors[0].amax(dimensions, keepdim=True).reshape(output.shape)


_extremum_rule = partial(_reduction_rule, error=_error_reduced, magnitude=same_entries)


@_extremum_rule("aten.amax", "aten.amin", "aten.max", "aten.min")
def reduced_extremum(call: Call) -> Upward:
    """1 in every norm: each entry is in one maximum, which moves by no more than its largest."""
    return call.input


@_reduction_rule("aten.sum", error=error_of_a_mean, casts=True)
def total(call: Call) -> Upward:
    """Over n entries: 1 for p = 1, ``sqrt(n)`` for p = 2, n for p = inf (Cauchy and Schwarz)."""
    count = reduced_count(call.node, call.operand_shapes[0])
    if math.isinf(call.norm):
        return call.input * float(count)
    return call.input * (power(count, 2) if call.norm == 2 else 1.0)


def _global_mean(node: Node, shape: tuple[int, ...]) -> Sequence[chain_stages.Stage] | None:
    """A pool over whole channels, with or without the axes of length 1 that are left."""
    axes = tuple(range(2, len(shape) + 1))
    if len(shape) not in (2, 3) or tuple(sorted(node.dimensions(1, "dim"))) != axes:
        return None
    pool = chain_stages.AveragePool(shape[1:], shape[1:], (0,) * len(axes))
    if len(node.shape) == 1:
        return [pool, chain_stages.Flatten()]
    return [pool] if len(node.shape) == len(shape) else None


@_reduction_rule(
    "aten.mean", error=error_of_a_mean, magnitude=same_entries, casts=True, stage=_global_mean
)
def mean(call: Call) -> Upward:
    """Over n entries: ``1/n`` for p = 1, ``1/sqrt(n)`` for p = 2, 1 for p = inf."""
    count = max(1, reduced_count(call.node, call.operand_shapes[0]))
    if math.isinf(call.norm):
        return call.input
    factor = math.nextafter(1.0 / (count if call.norm == 1 else math.sqrt(count)), 1.0)
    # The root is rounded as well: one more step up.
    return call.input * min(1.0, math.nextafter(factor, 1.0))


def _vector_norm_supported(node: Node) -> str | None:
    order = node.argument(1, "ord", 2)
    if order not in (1, 2, math.inf):
        return f"of order {order}"
    dimensions = node.dimensions(2, "dim")
    return "over the samples" if not dimensions or 0 in dimensions else None


@rule(
    "aten.linalg_vector_norm", supports=_vector_norm_supported, dimensions={2: "dim"}, leading=True
)
def reduced_norm(call: Call) -> Upward:
    """``| ||x||_q - ||y||_q | <= ||x - y||_q <= n^max(0, 1/q - 1/p) ||x - y||_p``."""
    order = float(call.node.number(1, "ord", 2.0))
    count = reduced_count(call.node, call.operand_shapes[0], position=2)
    if order >= call.norm:
        return call.input
    if order == 1 and math.isinf(call.norm):
        return call.input * float(count)
    return call.input * power(count, 2)  # (1, 2) and (2, inf)

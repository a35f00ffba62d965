"""Rules of pools: maxima and means over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.norms import Norm
from lipfast.ops.chain_stages import AveragePool, MaxPool
from lipfast.rules import windows
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import Arguments, Call, Errors, rule
from lipfast.rules.running_errors import error_of_linear_map
from lipfast.rules.upward import Upward
from lipfast.rules.windows import WindowMap, rounded_up


def pool_axes(node: Node) -> int:
    """Number of axes of a pool, from its name."""
    return int(node.op[node.op.index("pool") + len("pool")])


def same_entries(call: Call) -> Magnitude:
    """Entries of the result are no larger than the largest of the operand; more is not known."""
    return Magnitude(entry=call.magnitudes[0].entry)


def power(count: int, norm: Norm) -> Upward:
    """``count^(1/p)``: what reading every entry `count` times does to a norm."""
    if math.isinf(norm) or count == 0:
        return Upward.of(float(min(count, 1)))
    return Upward.of(float(count)) if norm == 1 else Upward.of(float(count)).square_root()


def error_of_moved_entries(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """The op itself on the errors: it moves entries, or takes maxima of them.

    A maximum moves by no more than the largest of the errors that it ranges over.
    """
    if errors[0] is None:
        return torch.zeros_like(output)
    return arguments.apply({arguments.node.reference(0): errors[0]})


def _sizes_along_axes(node: Node, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes of the operand and of the result along the axes of a pool."""
    axes = pool_axes(node)
    return list(zip(shape[-axes:], node.shape[-axes:], strict=True))


def _window_arguments(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes, strides and paddings along the axes."""
    axes = pool_axes(node)
    kernel = node.integers(1, "kernel_size", axes)
    given = node.argument(2, "stride") not in (None, ())
    stride = node.integers(2, "stride", axes) if given else kernel
    return kernel, stride, node.integers(3, "padding", axes, 0)


def _max_stage(node: Node, shape: tuple[int, ...]) -> Sequence[MaxPool] | None:
    axes = pool_axes(node)
    if len(shape) != axes + 1:
        return None
    dilation = node.integers(4, "dilation", axes, 1)
    return [MaxPool(*_window_arguments(node), dilation, node.argument(5, "ceil_mode") is True)]


_maximum_rule = partial(rule, error=error_of_moved_entries, magnitude=same_entries)


@_maximum_rule("aten.max_pool1d", "aten.max_pool2d", stage=_max_stage)
@_maximum_rule("aten.max_pool3d", "aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices")
def max_pool(call: Call) -> Upward:
    """``m^(1/p)``, m the largest number of windows that one entry is in; 1 for p = inf.

    ``|max_w x - max_w y| <= max_w |x - y|``, and ``sum_w max_{i in w} |d_i|^p`` counts every
    ``|d_i|^p`` at most m times. Overlap, padding, dilation and ceil mode are counted, axis by axis.
    """
    node = call.node
    kernel, stride, padding = _window_arguments(node)
    dilation = node.integers(4, "dilation", pool_axes(node), 1)
    sizes = _sizes_along_axes(node, call.operand_shapes[0])
    largest = math.prod(
        windows.multiplicity(size, windows.pool_windows(count, *window))
        for (size, count), *window in zip(sizes, kernel, stride, padding, dilation, strict=True)
    )
    return call.input * power(largest, call.norm)


def maximum_windows(node: Node, shape: Sequence[int]) -> list[list[list[int]]] | None:
    """For each axis of a max pool, which entries each window takes the maximum of.

    Args:
        node: any node.
        shape: of its operand, for one sample.

    Returns:
        The entries inside of the operand, by axes and windows; None for other nodes.
    """
    if "max_pool" not in node.op:
        return None
    sizes = _sizes_along_axes(node, shape)
    if "adaptive" in node.op:
        maps = [windows.adaptive_windows(size, count) for size, count in sizes]
        return [[[column for column, _ in row] for row in own.rows] for own in maps]
    kernel, stride, padding = _window_arguments(node)
    dilation = node.integers(4, "dilation", pool_axes(node), 1)
    return [
        [[at for at in window if 0 <= at < size] for window in windows.pool_windows(count, *own)]
        for (size, count), *own in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]


@_maximum_rule("aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d")
def adaptive_max_pool(call: Call) -> Upward:
    """``m^(1/p)`` as for `max_pool`, with windows ``[floor(i n / k), ceil((i + 1) n / k))``."""
    largest = 1
    for size, count in _sizes_along_axes(call.node, call.operand_shapes[0]):
        rows = windows.adaptive_windows(size, count).rows
        ranges = [range(row[0][0], row[-1][0] + 1) for row in rows]
        largest *= windows.multiplicity(size, ranges)
    return call.input * power(largest, call.norm)


def reduced_count(node: Node, shape: Sequence[int], position: int = 1) -> int:
    """Entries that a reduction takes together; its dimensions are the argument at `position`."""
    return math.prod(shape[dim - 1] for dim in node.dimensions(position, "dim"))


def _terms(node: Node, shape: tuple[int, ...]) -> int:
    """Most entries that one mean or sum takes together."""
    if "pool" not in node.op:
        return reduced_count(node, shape)
    if "adaptive" not in node.op:
        return math.prod(node.integers(1, "kernel_size", pool_axes(node)))
    return math.prod(size // max(1, count) + 2 for size, count in _sizes_along_axes(node, shape))


def error_of_a_mean(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """``gamma_{n+4} A (|x| + e / gamma_{n+4})``, weights A >= 0 that are themselves rounded."""
    x = arguments.node.reference(0)
    terms = _terms(arguments.node, arguments.shape(x)) + 4

    def apply(size: Tensor) -> Tensor:
        return arguments.apply({x: size})

    value = arguments.value(x)
    return error_of_linear_map(apply, value, errors[0], roundings=terms, room=terms + 8)


def _divisor_supported(node: Node) -> str | None:
    divisor = node.argument(6, "divisor_override")
    positive = divisor is None or (isinstance(divisor, (int, float)) and divisor > 0)
    return None if positive else "with a divisor that is not positive"


def product_of_norms(maps: Sequence[WindowMap], norm: Norm) -> Upward:
    """Norm of the tensor product of maps along the axes."""
    total = Upward.of(1.0)
    for entry in maps:
        total = total * windows.norm_of(entry, norm)
    return total


def _average_stage(node: Node, shape: tuple[int, ...]) -> Sequence[AveragePool] | None:
    if len(shape) != pool_axes(node) + 1 or node.argument(6, "divisor_override") is not None:
        return None
    include = node.argument(5, "count_include_pad", True) is not False
    return [AveragePool(*_window_arguments(node), node.argument(4, "ceil_mode") is True, include)]


_average_rule = partial(rule, supports=_divisor_supported, error=error_of_a_mean)


@_average_rule("aten.avg_pool1d", "aten.avg_pool2d", stage=_average_stage)
@_average_rule("aten.avg_pool3d")
def average_pool(call: Call) -> Upward:
    """Linear and separable: the product over the axes of exact norms of small matrices.

    Divisors as torch counts them with ``count_include_pad`` and ``ceil_mode``: both are products
    over the axes. Windows of k entries that do not overlap: ``k^(-1/2)`` for p = 2.
    """
    node = call.node
    kernel, stride, padding = _window_arguments(node)
    include = node.argument(5, "count_include_pad", True) is not False
    divisor = node.argument(6, "divisor_override") if pool_axes(node) > 1 else None
    sizes = _sizes_along_axes(node, call.operand_shapes[0])
    maps = [
        windows.average_windows(size, count, (window[0], window[1], window[2]), include)
        for (size, count), *window in zip(sizes, kernel, stride, padding, strict=True)
    ]
    scale = Fraction(1)
    if isinstance(divisor, int):
        maps = [_undivided(entry) for entry in maps]
        scale = Fraction(1, divisor)
    return call.input * product_of_norms(maps, call.norm) * rounded_up(scale)


def _undivided(average: WindowMap) -> WindowMap:
    rows = tuple(tuple((column, Fraction(1)) for column, _ in row) for row in average.rows)
    return WindowMap(average.size, rows)


def _adaptive_stage(node: Node, shape: tuple[int, ...]) -> Sequence[AveragePool] | None:
    """An adaptive pool whose windows do not overlap is an ordinary one."""
    if len(shape) != pool_axes(node) + 1:
        return None
    sizes = tuple(zip(shape[1:], node.shape[1:], strict=True))
    if any(size % count for size, count in sizes):
        return None
    kernel = tuple(size // count for size, count in sizes)
    return [AveragePool(kernel, kernel, (0,) * len(kernel))]


_adaptive_rule = partial(rule, error=error_of_a_mean, magnitude=same_entries)


@_adaptive_rule("aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", stage=_adaptive_stage)
@_adaptive_rule("aten.adaptive_avg_pool3d")
def adaptive_average_pool(call: Call) -> Upward:
    """Linear and separable, with windows ``[floor(i n / k), ceil((i + 1) n / k))`` along axes."""
    sizes = _sizes_along_axes(call.node, call.operand_shapes[0])
    maps = [windows.adaptive_windows(size, count) for size, count in sizes]
    return call.input * product_of_norms(maps, call.norm)

"""Rules of interpolation: linear and separable, with exact matrices along each axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache, partial

import torch
from torch import Tensor

from lipfast.graph.nodes import Node
from lipfast.rules.pooling import product_of_norms
from lipfast.rules.registry import Arguments, Call, Errors, rule
from lipfast.rules.running_errors import error_of_linear_map
from lipfast.rules.upward import Upward
from lipfast.rules.windows import WindowMap

# The coefficient of torch's cubic convolution (Keys, 1981, has -1/2).
_CUBIC = Fraction(-3, 4)
# Arguments of the ``vec`` overloads: x, output_size, align_corners, scale_factors.
Taps = Callable[[Fraction, int], tuple[tuple[int, Fraction], ...]]


def _linear_taps(position: Fraction, size: int) -> tuple[tuple[int, Fraction], ...]:
    position = max(position, Fraction(0))
    low = min(math.floor(position), size - 1)
    weight = position - low if low < size - 1 else Fraction(0)
    return ((low, 1 - weight), (min(low + 1, size - 1), weight))


def _cubic_taps(position: Fraction, size: int) -> tuple[tuple[int, Fraction], ...]:
    low = math.floor(position)
    offset = position - low
    taps = []
    for step in range(-1, 3):
        distance = abs(offset - step)
        taps.append((min(max(low + step, 0), size - 1), _cubic(distance)))
    return tuple(taps)


def _cubic(distance: Fraction) -> Fraction:
    a = _CUBIC
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a


@lru_cache(maxsize=256)
def interpolation(
    size: int, count: int, align_corners: bool, factor: float | None, *, cubic: bool
) -> WindowMap:
    """Interpolation from `size` to `count` points along one axis, in exact arithmetic.

    Args:
        size: of the input.
        count: of the output.
        align_corners: the ends of both grids coincide.
        factor: scale factor, where one was given instead of a size.
        cubic: four points instead of two.
    """
    taps: Taps = _cubic_taps if cubic else _linear_taps
    rows = []
    for index in range(count):
        if align_corners:
            position = Fraction(index * (size - 1), count - 1) if count > 1 else Fraction(0)
        else:
            scale = Fraction(size, count) if factor is None else 1 / Fraction(factor)
            position = scale * (index + Fraction(1, 2)) - Fraction(1, 2)
        merged: dict[int, Fraction] = {}
        for column, weight in taps(position, size):
            merged[column] = merged.get(column, Fraction(0)) + weight
        rows.append(tuple(merged.items()))
    return WindowMap(size, tuple(rows))


def _resampled_axes(node: Node) -> int:
    if "bi" in node.op:
        return 2
    return 3 if "tri" in node.op else 1


def _supported(node: Node) -> str | None:
    # vec overloads only: (x, sizes or None, align_corners, factors or None)
    sizes, factors = node.argument(1, "output_size"), node.argument(3, "scale_factors")
    whole = isinstance(sizes, tuple) or isinstance(factors, tuple)
    aligned = isinstance(node.argument(2, "align_corners"), bool)
    return None if whole and aligned else "with arguments of another overload"


def _maps(node: Node, shape: Sequence[int]) -> list[WindowMap]:
    axes = _resampled_axes(node)
    aligned = node.argument(2, "align_corners") is True
    factors = node.argument(3, "scale_factors")
    given: Sequence[float | None] = [None] * axes
    if isinstance(factors, tuple):
        given = [float(value) for value in factors if isinstance(value, (int, float))]
    return [
        interpolation(size, count, aligned, factor, cubic="cubic" in node.op)
        for size, count, factor in zip(shape[-axes:], node.shape[-axes:], given, strict=True)
    ]


def _along_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix along each of the last axes."""
    for axis, matrix in zip(range(-len(matrices), 0), matrices, strict=True):
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T.to(x), -1, axis)
    return x


def _evaluate_interpolation(arguments: Arguments) -> Tensor:
    argument = arguments.node.args[0]
    maps = _maps(arguments.node, arguments.shape(argument))
    return _along_axes(arguments.value(argument), [entry.dense() for entry in maps])


def _interpolation_error(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """``gamma |A| (|x| + e / gamma)``; the entries of A are rounded as well."""
    argument = arguments.node.args[0]
    maps = _maps(arguments.node, arguments.shape(argument))
    terms = sum(entry.size + 4 for entry in maps)
    matrices = [entry.dense().abs() for entry in maps]
    apply, x = partial(_along_axes, matrices=matrices), arguments.value(argument)
    return error_of_linear_map(apply, x, errors[0], roundings=terms, room=terms + 8)


@rule(
    "aten.upsample_linear1d",
    "aten.upsample_bilinear2d",
    "aten.upsample_trilinear3d",
    "aten.upsample_bicubic2d",
    supports=_supported,
    evaluate=_evaluate_interpolation,
    error=_interpolation_error,
)
def upsample(call: Call) -> Upward:
    """Product over the axes of the norms of the interpolation matrices, which are exact.

    Positions are those of `torch.nn.functional.interpolate`: ``(j + 1/2) / factor - 1/2``, or
    ``j (n - 1) / (m - 1)`` with aligned corners; the ends are repeated.
    """
    return call.input * product_of_norms(_maps(call.node, call.operand_shapes[0]), call.norm)

"""Sums, norms and products of parameters, with bounds of their errors; u is the unit roundoff."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.ops.emulation import products_are_ieee
from lipfast.ops.scaling import powers_of_two
from lipfast.plan.elementwise_errors import (
    absolute,
    largest_of_two,
    negative,
    plus,
    quotient,
    square_root,
    times,
)
from lipfast.plan.parameter_rules import Enclosure, enclosed, parameter_rule, with_error
from lipfast.rounding import gamma, u
from lipfast.rules.running_errors import (
    EVALUATION_ROUNDOFFS,
    error_of_bilinear_map,
    error_of_matmul,
)


def _axes(x: Tensor, dim: object) -> list[int]:
    """Dimensions to reduce: those given, or all of them."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(x.dim()))
    return [dim] if isinstance(dim, int) else [int(entry) for entry in dim]  # type: ignore[attr-defined]


def _term_count(x: Tensor, axes: Sequence[int]) -> int:
    return math.prod(x.shape[axis] for axis in axes if x.dim())


@parameter_rule("sum")
def _sum(x: object, dim: object = None, keepdim: bool = False) -> Enclosure:
    """Over n terms: ``sum e + gamma_n sum |x|``; exact for integers below 2^53."""
    value = enclosed(x)
    axes = _axes(value.tensor, dim)
    wide = gamma(_term_count(value.tensor, axes) + 2)
    result = value.tensor.sum(axes, keepdim=keepdim)
    size = value.tensor.abs().sum(axes, keepdim=keepdim)
    error = (value.radius + value.tensor.abs() * wide).sum(axes, keepdim=keepdim)
    inexact = (~value.whole).sum(axes, keepdim=keepdim)
    return with_error(result, error * (1 + 4 * wide)).unless((inexact == 0) & (size < 2.0**53))


@parameter_rule("mean")
def _mean(x: object, dim: object = None, keepdim: bool = False) -> Enclosure:
    """The sum divided by n."""
    value = enclosed(x).tensor
    return quotient(_sum(x, dim, keepdim), float(_term_count(value, _axes(value, dim))))


@parameter_rule("cumsum")
def _cumsum(x: object, dim: int) -> Enclosure:
    """``sum e + gamma_n sum |x|`` over the n entries before and with each."""
    value = enclosed(x)
    wide = gamma((value.tensor.shape[dim] if value.tensor.dim() else 1) + 2)
    result, size = value.tensor.cumsum(dim), value.tensor.abs().cumsum(dim)
    error = (value.radius + value.tensor.abs() * wide).cumsum(dim)
    inexact = (~value.whole).cumsum(dim)
    return with_error(result, error * (1 + 4 * wide)).unless((inexact == 0) & (size < 2.0**53))


@parameter_rule("amax")
def _amax(x: object, dim: object = None, keepdim: bool = False) -> Enclosure:
    """The largest entry moves by no more than the largest error."""
    value = enclosed(x)
    axes = _axes(value.tensor, dim)
    return Enclosure(value.tensor.amax(axes, keepdim), value.radius.amax(axes, keepdim))


@parameter_rule("amin")
def _amin(x: object, dim: object = None, keepdim: bool = False) -> Enclosure:
    return negative(_amax(negative(x), dim, keepdim))


@parameter_rule("max")
def _maximum(x: object, dim: object = None, keepdim: bool = False) -> Enclosure:
    """Of all entries or along a dimension, as `amax`; of two tensors, entry by entry."""
    if isinstance(dim, Enclosure):
        return largest_of_two(x, dim)
    return _amax(x, dim, keepdim)


@parameter_rule("min")
def _minimum(x: object, dim: object = None, keepdim: bool = False) -> Enclosure:
    if isinstance(dim, Enclosure):
        return negative(largest_of_two(negative(x), negative(dim)))
    return _amin(x, dim, keepdim)


@parameter_rule("var")
def _variance(
    x: object,
    dim: object = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Enclosure:
    """``sum (x - mean)^2 / (n - correction)``; the schema without `dim` has `unbiased` there."""
    if isinstance(dim, bool):
        return _variance(x, None, dim)
    value = enclosed(x)
    axes = _axes(value.tensor, dim)
    away = plus(value, negative(_mean(value, axes, True)))
    less = float(unbiased) if correction is None else float(correction)
    count = max(0.0, _term_count(value.tensor, axes) - less)
    return quotient(_sum(times(away, away), axes, keepdim), count)


@parameter_rule("std")
@functools.wraps(_variance)
def _deviation(*args: Any, **kwargs: Any) -> Enclosure:
    return square_root(_variance(*args, **kwargs))


@parameter_rule("softmax")
def _softmax(x: object, dim: int) -> Enclosure:
    """Half of the largest error of a row, and its own roundings, as `rules.attention` has them."""
    value = enclosed(x)
    result = value.tensor.softmax(dim)
    count = value.tensor.shape[dim] if value.tensor.dim() else 1
    least = value.tensor.amin(dim, keepdim=True)
    span = (value.tensor.amax(dim, keepdim=True) - least).clamp_max(800.0)
    roundings = span + (2.0 * EVALUATION_ROUNDOFFS + count + 8)
    moved = 0.5 * value.radius.amax(dim, keepdim=True)
    return with_error(result, moved + result * roundings * 2 * u)


def _euclidean(x: Enclosure, axes: list[int], keep: bool) -> Enclosure:
    """``| ||x|| - ||x'|| | <= ||e||``, and ``gamma_{n+4} ||x||``; scaled, so nothing overflows."""
    wide = gamma(_term_count(x.tensor, axes) + 8)

    def length(tensor: Tensor) -> Tensor:
        peak = tensor.abs().max() if tensor.numel() else tensor.sum()
        known = torch.isfinite(peak) & (peak > 0)
        exponent = (torch.frexp(peak).exponent - 1) * known
        scale = powers_of_two(exponent.clamp(-1022, 1023))
        return (tensor / scale).square().sum(axes, keepdim=keep).sqrt() * scale

    result = length(x.tensor)
    # Squares of entries far below the largest underflow: at most 2^-537 of it each.
    room = 2.0**-500 * (x.tensor.abs() + x.radius).amax() if x.tensor.numel() else 0.0
    return with_error(result, length(x.radius) * (1 + 4 * wide) + result * (2 * wide) + room)


_ORDERS = (1, 2, math.inf)


def _order_supported(x: object, ord: object = 2, *_: object) -> str | None:  # noqa: A002 (the schema's name)
    return None if ord in (None, *_ORDERS) else f"of order {ord}"


@parameter_rule("linalg_vector_norm", supports=_order_supported)
def _vector_norm(
    x: object,
    ord: object = 2,  # noqa: A002 (the schema's name)
    dim: object = None,
    keepdim: bool = False,
) -> Enclosure:
    """Orders 1, 2 and inf."""
    if ord == 1:
        return _sum(absolute(x), dim, keepdim)
    if ord == math.inf:
        return _amax(absolute(x), dim, keepdim)
    value = enclosed(x)
    return _euclidean(value, _axes(value.tensor, dim), keepdim)


@parameter_rule("norm", supports=_order_supported)
def _plain_norm(x: object, p: object = 2, dim: object = None, keepdim: bool = False) -> Enclosure:
    return _vector_norm(x, p, dim, keepdim)


@parameter_rule("_weight_norm")
def _weight_norm(v: object, g: object, dim: int = 0) -> Enclosure:
    """``g v / ||v||``, the norm over all dimensions but `dim` (-1: over all)."""
    value = enclosed(v)
    rank = value.tensor.dim()
    axes = [axis for axis in range(rank) if dim == -1 or axis != dim % rank]
    return times(value, quotient(g, _euclidean(value, axes, dim != -1)))


def matrix_product(a: Enclosure, b: Enclosure) -> Enclosure:
    """``A B`` over k terms: ``|A| e_B + e_A (|B| + e_B) + gamma_{k+2} |A| |B|``."""
    error = error_of_matmul(a.tensor, b.tensor, a.error, b.error)
    if a.tensor.is_cuda and not products_are_ieee(a.tensor.device):
        error = torch.full_like(error, math.inf)
    return Enclosure(a.tensor @ b.tensor, error)


@parameter_rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def _matmul(x: object, y: object) -> Enclosure:
    return matrix_product(enclosed(x), enclosed(y))


@parameter_rule("inner")
def _inner(x: object, y: object) -> Enclosure:
    """Over the last dimensions of both: ``A B^T`` of matrices; a product with a number."""
    first, second = enclosed(x), enclosed(y)
    if 0 in (first.tensor.dim(), second.tensor.dim()):
        return times(first, second)
    width = first.tensor.shape[-1]
    rows = first.rearranged(lambda tensor: tensor.reshape(-1, width))
    columns = second.rearranged(lambda tensor: tensor.reshape(-1, width).mT)
    shape = (*first.tensor.shape[:-1], *second.tensor.shape[:-1])
    return matrix_product(rows, columns).rearranged(lambda tensor: tensor.reshape(shape))


@parameter_rule("outer", "ger")
def _outer(x: object, y: object) -> Enclosure:
    return times(enclosed(x).rearranged(lambda tensor: tensor[:, None]), y)


@parameter_rule("linear")
def _linear(x: object, weight: object, bias: object = None) -> Enclosure:
    product = matrix_product(enclosed(x), enclosed(weight).rearranged(_turned))
    return product if bias is None else plus(product, bias)


def _turned(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.dim() > 1 else matrix


@parameter_rule("matmul", namespace="lipfast")
def _affine_map(x: object, weight: object, bias: object = None) -> Enclosure:
    product = _matmul(x, weight)
    return product if bias is None else plus(product, bias)


def _composed(outer: Tensor, inner: Tensor, near: Sequence[int], far: Sequence[int]) -> Tensor:
    """``sum W_2[t_2] W_1[t_1]``, placed at ``near t_1 + far t_2``."""
    axes = range(len(near))
    sizes = [
        (inner.shape[2 + a] - 1) * near[a] + (outer.shape[2 + a] - 1) * far[a] + 1 for a in axes
    ]
    # Of many networks at once what is written to must be of as many.
    origin: tuple[Any, ...] = (..., *(0 for _ in near))
    like = outer[origin] @ inner[origin]
    result = like.new_zeros(outer.shape[0], inner.shape[1], *sizes)
    for second in itertools.product(*(range(count) for count in outer.shape[2:])):
        for first in itertools.product(*(range(count) for count in inner.shape[2:])):
            at = tuple(first[a] * near[a] + second[a] * far[a] for a in axes)
            far_taps: tuple[Any, ...] = (..., *second)
            near_taps: tuple[Any, ...] = (..., *first)
            place: tuple[Any, ...] = (..., *at)
            result[place] += outer[far_taps] @ inner[near_taps]
    return result


@parameter_rule("composed_kernels", namespace="lipfast")
def composed_kernels(
    second: object, first: object, near: Sequence[int], far: Sequence[int]
) -> Enclosure:
    """The kernel of two convolutions: n terms and their sums, ``gamma_{n+2} |W_2| * |W_1|``."""
    outer, inner = enclosed(second), enclosed(first)
    terms = outer.tensor[0].numel() + inner.tensor[0, 0].numel() + 2

    def composed(first: Tensor, second: Tensor) -> Tensor:
        return _composed(first, second, near, far)

    operands = outer.tensor, inner.tensor, outer.error, inner.error
    error = error_of_bilinear_map(composed, *operands, roundings=terms, room=terms + 8)
    if outer.tensor.is_cuda and not products_are_ieee(outer.tensor.device):
        error = torch.full_like(error, math.inf)
    return Enclosure(composed(outer.tensor, inner.tensor), error)

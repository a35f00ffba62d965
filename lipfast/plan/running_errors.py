"""Ops on parameters with elementwise bounds of their rounding errors, in float64.

Running error analysis (Higham, 2002, section 3.3): with x the computed operand and e the bound of
its error, every function here returns the computed result and a bound that holds for all true
operands within e of x. u is the unit roundoff.

A rule is an ordinary function whose parameters are the arguments of the ATen op, in the schema's
order and with its names. Arguments that a rule has no parameter for are refused, never dropped.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.rounding import SMALLEST, UNDERFLOW, gamma, u

# As in `lipfast.rules.pointwise`: assumed of torch's float64 elementary functions.
_EVALUATION = 32


@dataclass(frozen=True)
class Value:
    """A tensor, and an elementwise bound of its error (None: it is exact)."""

    tensor: Tensor
    error: Tensor | None = None


@dataclass(frozen=True)
class ErrorRule:
    """How an op is evaluated with its error, and why particular options are beyond that."""

    evaluate: Callable[..., Value]
    supports: Callable[..., str | None] | None = None


RULES: dict[str, ErrorRule] = {}
Function: TypeAlias = Callable[..., Value]


def rule(
    *names: str, supports: Callable[..., str | None] | None = None, namespace: str = "aten"
) -> Callable[[Function], Function]:
    """Register a function under names of ops.

    Args:
        names: without their namespace.
        supports: gets what the function gets, with references in the place of tensors; says why
            these arguments are beyond the rule, or None.
        namespace: of the names.
    """

    def register(function: Function) -> Function:
        for name in names:
            RULES[f"{namespace}.{name}"] = ErrorRule(function, supports)
        return function

    return register


def bind(node: Node) -> inspect.BoundArguments:
    """The arguments of a node by the parameters of its rule.

    Casts between floating dtypes are identities: such a dtype is left out, as is what is None.

    Raises:
        TypeError: there is an argument that the rule does not read.
    """
    signature = inspect.signature(RULES[node.op].evaluate)
    args = list(node.args)
    while args and (args[-1] is None or _is_floating_dtype(args[-1])):
        args.pop()
    kwargs = {
        name: value
        for name, value in node.kwargs
        if name in signature.parameters or not (value is None or _is_floating_dtype(value))
    }
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def _is_floating_dtype(argument: Argument) -> bool:
    if not isinstance(argument, Reference) or argument.kind != "dtype":
        return False
    return bool(getattr(torch, argument.name).is_floating_point)


def refusal(node: Node) -> str | None:
    """Why the rule of a node does not cover its arguments; None if it does.

    An integer dtype is left to the evaluation, which knows whether the operands are integers.
    """
    kwargs = tuple(
        (name, value)
        for name, value in node.kwargs
        if not (isinstance(value, Reference) and value.kind == "dtype")
    )
    try:
        bound = bind(replace(node, kwargs=kwargs))
    except TypeError as error:
        return f"its rule does not cover these arguments: {error}"
    supports = RULES[node.op].supports
    return None if supports is None else supports(*bound.args, **bound.kwargs)


def _value(operand: object) -> Value:
    """An operand as float64; numbers of the code are exact."""
    if isinstance(operand, Value):
        tensor = operand.tensor
        return Value(tensor.double() if not tensor.is_floating_point() else tensor, operand.error)
    return Value(torch.as_tensor(operand, dtype=torch.float64, device="cpu"))


def _error(value: Value) -> Tensor:
    return torch.zeros_like(value.tensor) if value.error is None else value.error


def _widened(error: Tensor, roundings: int = 16) -> Tensor:
    return error * (1.0 + 2 * gamma(roundings)) + UNDERFLOW


def _finished(result: Tensor, error: Tensor, exact: Tensor) -> Value:
    """`error` where the result may be rounded, 0 where operands and result say it is not."""
    return Value(result, torch.where(exact, torch.zeros_like(error), _widened(error)))


def _rounded(result: Tensor, error: Tensor) -> Value:
    return Value(result, _widened(error))


def _whole(value: Value) -> Tensor:
    """Integers without errors: sums and products of them below 2^53 are exact."""
    return (value.tensor == value.tensor.round()) & (_error(value) == 0)


def _power_of_two(tensor: Tensor) -> Tensor:
    return tensor.frexp().mantissa.abs() == 0.5


@rule("add")
def _add(x: object, y: object, alpha: float = 1.0) -> Value:
    """``x + alpha y``: ``e_x + e_p + u |z|``, p the product; exact where torch's sum is."""
    first, second, alpha = _value(x), _value(y), float(alpha)
    scaled = second if alpha == 1.0 else _mul(second, alpha)
    result = first.tensor + scaled.tensor
    # The rounding of the sum itself is known exactly (Knuth); of infinite operands there is none.
    part = result - first.tensor
    lost = (first.tensor - (result - part)) + (scaled.tensor - part)
    infinite = torch.isinf(first.tensor) | torch.isinf(scaled.tensor)
    certain = (_error(first) == 0) & (_error(scaled) == 0)
    error = _error(first) + _error(scaled) + 2 * u * result.abs()
    return _finished(result, error, certain & ((lost == 0) | infinite))


@rule("sub")
def _sub(x: object, y: object, alpha: float = 1.0) -> Value:
    """``x - alpha y``, as for a sum."""
    return _add(x, y, -float(alpha))


@rule("rsub")
def _rsub(x: object, y: object, alpha: float = 1.0) -> Value:
    """``y - alpha x``: the operands change places."""
    return _sub(y, x, alpha)


@rule("mul")
def _mul(x: object, y: object) -> Value:
    """``x y``: ``|x| e_y + |y| e_x + e_x e_y + u |z|``."""
    first, second = _value(x), _value(y)
    result = first.tensor * second.tensor
    error = first.tensor.abs() * _error(second)
    error = error + (second.tensor.abs() + _error(second)) * _error(first)
    certain = (_error(first) == 0) & (_error(second) == 0)
    small = _whole(first) & _whole(second) & (result.abs() < 2.0**53)
    zero = (first.tensor == 0) | (second.tensor == 0)
    normal = (result.abs() > 2.0**-900) & torch.isfinite(result)
    scaled = (_power_of_two(first.tensor) | _power_of_two(second.tensor)) & normal
    infinite = torch.isinf(first.tensor) | torch.isinf(second.tensor)
    exact = certain & (small | zero | scaled | infinite)
    return _finished(result, error + 2 * u * result.abs(), exact)


@rule("div")
def _div(x: object, y: object) -> Value:
    """``x / y``: ``(e_x + |z| e_y) / (|y| - e_y) + 2 u |z|``; inf where y may be 0.

    Two roundings, and 2^-1074 |x|: on CUDA a number's reciprocal is multiplied with, which may be
    denormal.
    """
    first, second = _value(x), _value(y)
    result = first.tensor / second.tensor
    least = (second.tensor.abs() - _error(second)) * (1.0 - 4 * u)
    error = (_error(first) + (result.abs() * (1 + 4 * u)) * _error(second)) / least
    error = error + 2 * u * result.abs() + first.tensor.abs() * SMALLEST
    error = torch.where(least > 0, error, math.inf)
    certain = (_error(first) == 0) & (_error(second) == 0)
    # A whole quotient below 2^53 of whole numbers, if it multiplies back to them.
    whole = _whole(first) & _whole(second) & (first.tensor.abs() < 2.0**53)
    back = (result == result.round()) & (result * second.tensor == first.tensor)
    normal = (result.abs() > 2.0**-900) & torch.isfinite(result)
    scaled = _power_of_two(second.tensor) & normal
    return _finished(result, error, certain & ((whole & back) | scaled) & (second.tensor != 0))


@rule("remainder")
def _remainder(x: object, y: object) -> Value:
    """``x - y floor(x / y)`` of exact operands: `fmod` is exact, the shift by y is rounded.

    inf for operands with errors: there it jumps.
    """
    first, second = _value(x), _value(y)
    result = torch.remainder(first.tensor, second.tensor)
    certain = (_error(first) == 0) & (_error(second) == 0)
    error = torch.where(certain, 2 * u * result.abs(), math.inf)
    unmoved = (result == torch.fmod(first.tensor, second.tensor)) | (_whole(first) & _whole(second))
    return _finished(result, error, certain & unmoved)


@rule("reciprocal")
def _reciprocal(x: object) -> Value:
    """``1 / x``."""
    return _div(1.0, x)


def _moved_by(result: Tensor, *operands: object) -> Value:
    """Nothing is rounded, and the result moves by no more than the operands."""
    largest = torch.zeros_like(result)
    for operand in operands:
        if isinstance(operand, Value):
            largest = torch.maximum(largest, _error(_value(operand)).expand_as(result))
    return Value(result, largest)


@rule("neg")
def _neg(x: object) -> Value:
    return _moved_by(-_value(x).tensor, x)


@rule("abs")
def _abs(x: object) -> Value:
    return _moved_by(_value(x).tensor.abs(), x)


@rule("relu")
def _relu(x: object) -> Value:
    return _moved_by(_value(x).tensor.relu(), x)


@rule("maximum")
def _maximum(x: object, other: object) -> Value:
    return _moved_by(torch.maximum(_value(x).tensor, _value(other).tensor), x, other)


@rule("minimum")
def _minimum(x: object, other: object) -> Value:
    return _moved_by(torch.minimum(_value(x).tensor, _value(other).tensor), x, other)


@rule("clamp_min")
def _clamp_min(x: object, min: object) -> Value:  # noqa: A002 (the schema's name)
    return _maximum(x, min)


@rule("clamp_max")
def _clamp_max(x: object, max: object) -> Value:  # noqa: A002 (the schema's name)
    return _minimum(x, max)


@rule("clamp")
def _clamp(x: object, min: object = None, max: object = None) -> Value:  # noqa: A002
    """``min(max(x, least), most)``, in this order."""
    found = _value(x)
    found = found if min is None else _maximum(found, min)
    return found if max is None else _minimum(found, max)


@rule("amax")
def _amax(x: object, dim: object = None, keepdim: bool = False) -> Value:
    """The largest entry moves by no more than the largest error."""
    value = _value(x)
    axes = _all(value.tensor, _axes(dim))
    return Value(value.tensor.amax(axes, keepdim), _error(value).amax(axes, keepdim))


@rule("amin")
def _amin(x: object, dim: object = None, keepdim: bool = False) -> Value:
    return _neg(_amax(_neg(x), dim, keepdim))


@rule("square")
def _square(x: object) -> Value:
    """``x^2`` as a product."""
    return _mul(x, x)


@rule("sqrt")
def _sqrt(x: object) -> Value:
    """``|sqrt x - sqrt x'| <= e / sqrt x`` and at most sqrt(e); inf where x - e is negative."""
    value = _value(x)
    result, e = value.tensor.sqrt(), _error(value)
    moved = torch.where(result > 0, torch.minimum(e / (result * (1 - 4 * u)), e.sqrt()), e.sqrt())
    error = moved * (1 + 8 * u) + 2 * u * result
    return _rounded(result, torch.where(value.tensor >= e, error, math.inf))


@rule("rsqrt")
def _rsqrt(x: object) -> Value:
    """``1 / sqrt(x)``."""
    return _reciprocal(_sqrt(x))


@rule("exp")
def _exp(x: object) -> Value:
    """``(exp(e) - 1) exp(x)``, and the evaluation's own rounding."""
    value = _value(x)
    result = value.tensor.exp()
    error = torch.expm1(_error(value)) * result * (1 + 64 * u)
    return _rounded(result, error + result * (_EVALUATION * u) * (value.tensor.abs() + 2))


@rule("log")
def _log(x: object) -> Value:
    """``e / (x - e)`` and the evaluation's own rounding; inf where x may be 0."""
    value = _value(x)
    result = value.tensor.log()
    least = (value.tensor - _error(value)) * (1 - 4 * u)
    error = _error(value) / least * (1 + 8 * u) + (result.abs() + 1.0) * (_EVALUATION * u)
    return _rounded(result, torch.where(least > 0, error, math.inf))


def _smooth(
    function: Callable[[Tensor], Tensor], x: object, *, slope: float, offset: float
) -> Value:
    """``sup |f'| e`` and the evaluation's own rounding."""
    value = _value(x)
    result = function(value.tensor)
    size = value.tensor.abs() + result.abs() + offset
    return _rounded(result, slope * _error(value) + size * (_EVALUATION * u))


@rule("tanh")
def _tanh(x: object) -> Value:
    return _smooth(torch.tanh, x, slope=1.0, offset=0.0)


@rule("sigmoid")
def _sigmoid(x: object) -> Value:
    return _smooth(torch.sigmoid, x, slope=0.25, offset=1.0)


@rule("sin")
def _sin(x: object) -> Value:
    return _smooth(torch.sin, x, slope=1.0, offset=0.0)


@rule("cos")
def _cos(x: object) -> Value:
    return _smooth(torch.cos, x, slope=1.0, offset=1.0)


@rule("softplus")
def _softplus(x: object, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """``x`` where ``beta x > threshold``, else ``log(1 + exp(beta x)) / beta``, as torch has it.

    inf where ``beta x`` is so near to the threshold that rounding may choose the other branch.
    """
    value, beta = _value(x), float(beta)
    scaled = value if beta == 1.0 else _mul(value, beta)
    soft = _smooth(lambda y: torch.logaddexp(y, torch.zeros_like(y)), scaled, slope=1.0, offset=1.0)
    smooth = _div(soft, beta)
    linear = scaled.tensor > threshold
    error = torch.where(linear, _error(value), _error(smooth))
    # The difference of neighbours is exact, others are far from 0; the factor is to spare.
    near = (scaled.tensor - threshold).abs() <= _error(scaled) * (1 + 4 * u)
    unsure = near & (_error(scaled) > 0)
    return Value(
        torch.where(linear, value.tensor, smooth.tensor), torch.where(unsure, math.inf, error)
    )


def _axes(dim: object) -> list[int] | None:
    """Dimensions to reduce; None for all of them."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return None
    return [dim] if isinstance(dim, int) else [int(entry) for entry in dim]  # type: ignore[attr-defined]


def _count(x: Tensor, dims: list[int] | None) -> int:
    return x.numel() if dims is None else math.prod(x.shape[dim] for dim in dims if x.dim())


def _all(x: Tensor, dims: list[int] | None) -> list[int]:
    return list(range(x.dim())) if dims is None else dims


@rule("sum")
def _sum(x: object, dim: object = None, keepdim: bool = False) -> Value:
    """Over n terms: ``sum e + gamma_n sum |x|``; exact for integers below 2^53."""
    value, dims = _value(x), _axes(dim)
    axes = _all(value.tensor, dims)
    wide = gamma(_count(value.tensor, dims) + 2)
    result = value.tensor.sum(axes, keepdim=keepdim)
    size = value.tensor.abs().sum(axes, keepdim=keepdim)
    error = (_error(value) + value.tensor.abs() * wide).sum(axes, keepdim=keepdim)
    inexact = (~_whole(value)).sum(axes, keepdim=keepdim)
    return _finished(result, error * (1 + 4 * wide), (inexact == 0) & (size < 2.0**53))


@rule("mean")
def _mean(x: object, dim: object = None, keepdim: bool = False) -> Value:
    """The sum divided by n."""
    return _div(_sum(x, dim, keepdim), float(_count(_value(x).tensor, _axes(dim))))


@rule("cumsum")
def _cumsum(x: object, dim: int) -> Value:
    """``sum e + gamma_n sum |x|`` over the n entries before and with each."""
    value = _value(x)
    wide = gamma((value.tensor.shape[dim] if value.tensor.dim() else 1) + 2)
    result, size = value.tensor.cumsum(dim), value.tensor.abs().cumsum(dim)
    error = (_error(value) + value.tensor.abs() * wide).cumsum(dim)
    inexact = (~_whole(value)).cumsum(dim)
    return _finished(result, error * (1 + 4 * wide), (inexact == 0) & (size < 2.0**53))


def _euclidean(x: Value, dims: list[int] | None, keep: bool) -> Value:
    """``| ||x|| - ||x'|| | <= ||e||``, and ``gamma_{n+4} ||x||``; scaled, so nothing overflows."""
    axes = _all(x.tensor, dims)
    wide = gamma(_count(x.tensor, dims) + 8)

    def length(tensor: Tensor) -> Tensor:
        peak = tensor.abs().max() if tensor.numel() else tensor.sum()
        scale = 2.0 ** (math.frexp(float(peak))[1] - 1) if float(peak) > 0 else 1.0
        return (tensor / scale).square().sum(axes, keepdim=keep).sqrt() * scale

    result = length(x.tensor)
    # Squares of entries far below the largest underflow: at most 2^-537 of it each.
    room = 2.0**-500 * (x.tensor.abs() + _error(x)).amax() if x.tensor.numel() else 0.0
    return _rounded(result, length(_error(x)) * (1 + 4 * wide) + result * (2 * wide) + room)


_ORDERS = (1, 2, math.inf)


def _order_supported(x: object, ord: object = 2, *_: object) -> str | None:  # noqa: A002 (the schema's name)
    return None if ord in (None, *_ORDERS) else f"of order {ord}"


@rule("linalg_vector_norm", supports=_order_supported)
def _vector_norm(x: object, ord: object = 2, dim: object = None, keepdim: bool = False) -> Value:  # noqa: A002
    """Orders 1, 2 and inf."""
    if ord == 1:
        return _sum(_abs(x), dim, keepdim)
    if ord == math.inf:
        return _amax(_abs(x), dim, keepdim)
    return _euclidean(_value(x), _axes(dim), keepdim)


@rule("norm", supports=_order_supported)
def _norm(x: object, p: object = 2, dim: object = None, keepdim: bool = False) -> Value:
    return _vector_norm(x, p, dim, keepdim)


@rule("_weight_norm")
def _weight_norm(v: object, g: object, dim: int = 0) -> Value:
    """``g v / ||v||``, the norm over all dimensions but `dim` (-1: over all)."""
    value = _value(v)
    rank = value.tensor.dim()
    axes = [axis for axis in range(rank) if dim == -1 or axis != dim % rank]
    return _mul(value, _div(g, _euclidean(value, axes, dim != -1)))


def _product(a: Value, b: Value) -> Value:
    """``A B`` over k terms: ``|A| e_B + e_A (|B| + e_B) + gamma_{k+2} |A| |B|``."""
    inner = a.tensor.shape[-1]
    wide = gamma(inner + 2)
    result = a.tensor @ b.tensor
    size = b.tensor.abs()
    # The factor comes last: |A| gamma may underflow and then meet a large entry of B.
    error = (a.tensor.abs() @ size) * wide
    if b.error is not None:
        error = error + a.tensor.abs() @ b.error
    if a.error is not None:
        error = error + a.error @ (size if b.error is None else size + b.error)
    return Value(result, error * (1.0 + 2 * gamma(inner + 8)) + UNDERFLOW)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def _matmul(x: object, y: object) -> Value:
    return _product(_value(x), _value(y))


def _reshaped(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """Entries moved, and their errors alike."""
    return Value(change(value.tensor), None if value.error is None else change(value.error))


@rule("inner")
def _inner(x: object, y: object) -> Value:
    """Over the last dimensions of both: ``A B^T`` of matrices; a product with a number."""
    first, second = _value(x), _value(y)
    if 0 in (first.tensor.dim(), second.tensor.dim()):
        return _mul(first, second)
    width = first.tensor.shape[-1]
    rows = _reshaped(first, lambda tensor: tensor.reshape(-1, width))
    columns = _reshaped(second, lambda tensor: tensor.reshape(-1, width).mT)
    shape = (*first.tensor.shape[:-1], *second.tensor.shape[:-1])
    return _reshaped(_product(rows, columns), lambda tensor: tensor.reshape(shape))


@rule("outer", "ger")
def _outer(x: object, y: object) -> Value:
    return _mul(_reshaped(_value(x), lambda tensor: tensor[:, None]), y)


@rule("linear")
def _linear(x: object, weight: object, bias: object = None) -> Value:
    product = _product(_value(x), _reshaped(_value(weight), _transposed))
    return product if bias is None else _add(product, bias)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.dim() > 1 else matrix


@rule("matmul", namespace="lipfast")
def _affine(x: object, weight: object, bias: object = None) -> Value:
    product = _matmul(x, weight)
    return product if bias is None else _add(product, bias)


_POWERS: dict[float, Function] = {
    2: _square,
    0.5: _sqrt,
    -1: _reciprocal,
    -0.5: _rsqrt,
}


def _power_supported(x: object, exponent: object) -> str | None:
    if isinstance(exponent, (int, float)):
        small = float(exponent).is_integer() and 1 <= exponent <= 8
        return None if exponent in _POWERS or small else f"with the exponent {exponent}"
    positive = isinstance(x, (int, float)) and 0.0 < x < math.inf
    return None if positive else "with a tensor of exponents"


@rule("pow", supports=_power_supported)
def _pow(x: object, exponent: object) -> Value:
    """Powers 1/2, -1, -1/2 and 1 to 8; of a positive number b also ``b^y``.

    ``|b^y - b^y'| <= b^y (exp(|log b| e) - 1)``, and the evaluation's own rounding.
    """
    if isinstance(exponent, (int, float)):
        if exponent in _POWERS:
            return _POWERS[exponent](x)
        found = _value(x)
        for _ in range(int(exponent) - 1):
            found = _mul(found, x)
        return found
    assert isinstance(x, (int, float))
    power = _value(exponent)
    result = float(x) ** power.tensor
    size = abs(math.log(x)) * (1 + 4 * u)
    error = torch.expm1(size * _error(power)) * result * (1 + 64 * u)
    rounding = (_EVALUATION * u) * (power.tensor.abs() * size + 2)
    return _rounded(result, error + result * rounding)


@rule("arange")
def _arange(start: float, end: float | None = None, step: float = 1) -> Value:
    """``start + i step``, one product and one sum."""
    if end is None:
        start, end = 0, start
    count = torch.arange(start, end, step, dtype=torch.float64, device="cpu").numel()
    return _add(start, _mul(Value(torch.arange(count, dtype=torch.float64, device="cpu")), step))


@rule("linspace")
def _linspace(start: float, end: float, steps: int) -> Value:
    """``start + i (end - start) / (n - 1)``."""
    places = _div(
        Value(torch.arange(steps, dtype=torch.float64, device="cpu")), float(max(1, steps - 1))
    )
    return _add(start, _mul(places, _sub(end, start)))


def _composed(outer: Tensor, inner: Tensor, near: Sequence[int], far: Sequence[int]) -> Tensor:
    """``sum W_2[t_2] W_1[t_1]``, placed at ``near t_1 + far t_2``."""
    axes = range(len(near))
    sizes = [
        (inner.shape[2 + a] - 1) * near[a] + (outer.shape[2 + a] - 1) * far[a] + 1 for a in axes
    ]
    result = torch.zeros(outer.shape[0], inner.shape[1], *sizes, dtype=torch.float64, device="cpu")
    for second in itertools.product(*(range(count) for count in outer.shape[2:])):
        for first in itertools.product(*(range(count) for count in inner.shape[2:])):
            at = tuple(first[a] * near[a] + second[a] * far[a] for a in axes)
            far_taps: tuple[Any, ...] = (..., *second)
            near_taps: tuple[Any, ...] = (..., *first)
            place: tuple[Any, ...] = (..., *at)
            result[place] += outer[far_taps] @ inner[near_taps]
    return result


@rule("composed_kernels", namespace="lipfast")
def composed_kernels(
    second: object, first: object, near: Sequence[int], far: Sequence[int]
) -> Value:
    """The kernel of two convolutions: n terms and their sums, ``gamma_{n+2} |W_2| * |W_1|``."""
    outer, inner = _value(second), _value(first)
    terms = outer.tensor[0].numel() + inner.tensor[0, 0].numel() + 2

    def composed(first: Tensor, second: Tensor) -> Tensor:
        return _composed(first, second, near, far)

    size, other = outer.tensor.abs(), inner.tensor.abs()
    error = composed(size, other) * gamma(terms)
    if inner.error is not None:
        error = error + composed(size, inner.error)
    if outer.error is not None:
        error = error + composed(outer.error, other + _error(inner))
    result = composed(outer.tensor, inner.tensor)
    return Value(result, error * (1.0 + 2 * gamma(terms + 8)) + UNDERFLOW)
